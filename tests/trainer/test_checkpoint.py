"""Checkpoints are whole or not there."""

import errno
from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import tiny_gpt2
from trainer import checkpoint as checkpoints
from trainer.config import ConfigError, LoraSettings, PPOHyperparameters
from trainer.models import Policy, add_lora
from trainer.update import PPOStepper


def stepper(seed: int = 0) -> PPOStepper:
    torch.manual_seed(seed)
    policy = Policy(add_lora(tiny_gpt2(), LoraSettings()))
    return PPOStepper(policy, None, PPOHyperparameters(batch_size=2, mini_batch_size=2, learning_rate=1e-2))


def save(root: Path, stepper: PPOStepper, keep: int = 2) -> checkpoints.Checkpoint:
    return checkpoints.save_checkpoint(
        root, stepper.policy, stepper, config={"a": {"b": 1}}, reward_revision="r1", keep=keep
    )


def advance(stepper: PPOStepper) -> None:
    stepper.step([[1, 2], [3]], [[4, 5, 6], [7, 8]], [1.0, -1.0])


def test_a_restored_stepper_goes_on_to_the_bit(tmp_path: Path) -> None:
    one, other = stepper(), stepper(seed=1)
    advance(one)
    checkpoints.restore(save(tmp_path, one), other.policy, other)
    advance(one)
    advance(other)
    for name, tensor in one.policy.state_dict().items():
        assert torch.equal(tensor, other.policy.state_dict()[name]), name
    assert one.kl_coef == other.kl_coef


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    one = stepper()
    for _ in range(4):
        advance(one)
        save(tmp_path, one, keep=2)
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [3, 4]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stepper()
    advance(one)
    save(tmp_path, one)
    advance(one)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, one)
    (found,) = checkpoints.list_checkpoints(tmp_path)
    assert found.step == 1
    checkpoints.restore(found, one.policy, one)
    assert one.steps_done == 1


def test_a_directory_without_its_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000009").mkdir()
    assert checkpoints.list_checkpoints(tmp_path) == []
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoints.read_checkpoint(tmp_path / "step-000009")


def test_harmless_differences_are_told_and_others_refused_with_both_values() -> None:
    saved = {"steps": 10, "reward": {"url": ["a"]}, "ppo": {"gamma": 1.0}}
    assert checkpoints.check_same_run(saved, {**saved, "steps": 20}) == ["steps: 10 -> 20"]
    assert checkpoints.check_same_run(saved, {**saved, "reward": {"url": ["b"]}}) == ["reward.url: ['a'] -> ['b']"]
    with pytest.raises(ConfigError, match=r"ppo\.gamma: 1\.0 -> 0\.9"):
        checkpoints.check_same_run(saved, {**saved, "ppo": {"gamma": 0.9}})
