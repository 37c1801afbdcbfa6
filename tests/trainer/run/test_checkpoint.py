"""Checkpoints are whole or not there."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import kills
from harness.machine.disks import fill, small_disk
from harness.runs import assert_same
from harness.tiny_models import tiny_gpt2
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.adapters import add_lora
from plaudit.policy.model import Policy
from plaudit.run import checkpoint as checkpoints
from plaudit.run.storage import NotWritten
from plaudit.settings.plain import to_dict
from plaudit.settings.policy import LoraSettings, ModelSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters


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


@pytest.mark.parametrize("room_kib", [0, 4, 12, 24])
def test_a_full_disk_leaves_the_previous_checkpoint_and_no_litter(tmp_path: Path, room_kib: int) -> None:
    one = stepper()
    advance(one)
    with small_disk(tmp_path / "disk", 512) as disk:
        save(disk / "checkpoints", one)
        expected = copy.deepcopy(one.policy.state_dict())
        advance(one)
        filler = fill(disk, but_kib=room_kib)
        with pytest.raises(NotWritten, match=r"cannot write .*/\.step-000002\.writing: No space left on device.* room"):
            save(disk / "checkpoints", one)
        (found,) = checkpoints.list_checkpoints(disk / "checkpoints")
        assert [path.name for path in found.directory.parent.iterdir()] == ["step-000001"]
        checkpoints.restore(found, one.policy, one)
        assert one.steps_done == 1
        assert_same(one.policy.state_dict(), expected)
        filler.unlink()
        advance(one)
        assert save(disk / "checkpoints", one).step == 2


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    # With 1 and 2 there, 2 is saved again and then 3; killed before the first operation on a file, the second, ...
    steppers = {step: stepper() for step in (1, 2, 3)}
    for step, one in steppers.items():
        for _ in range(step):
            advance(one)
        if step < 3:
            save(tmp_path / "before", one)

    def work(root: Path) -> None:
        save(root, steppers[2])
        save(root, steppers[3])

    def check(root: Path) -> int:
        newest = checkpoints.list_checkpoints(root)[-1]
        resumed = stepper(seed=1)
        checkpoints.restore(newest, resumed.policy, resumed)
        assert resumed.steps_done == newest.step >= 2
        assert_same(resumed.policy.state_dict(), steppers[newest.step].policy.state_dict())
        return newest.step

    before, root = tmp_path / "before", tmp_path / "run"
    found = [check(root) for _ in kills.after_each_kill(work, before, root)]
    assert found == sorted(found)
    assert found[-1] == 3
    print(f"checkpoints: {len(found) - 1} kills")
    for operations in (len(found) // 3, found.index(3) - 1, len(found) - 2):
        kills.fresh(before, root)
        kills.really_killed(work, root, operations)
        assert check(root) == found[operations]


def test_going_on_from_an_earlier_checkpoint_forgets_those_of_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    one = stepper()
    saved = []
    for _ in range(3):
        advance(one)
        saved.append(save(tmp_path, one, keep=3))
    checkpoints.restore(saved[0], one.policy, one)
    assert checkpoints.forget_checkpoints_after(tmp_path, 1) == [saved[1].directory, saved[2].directory]
    advance(one)
    save(tmp_path, one, keep=2)
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(tmp_path)] == [1, 2]


def test_a_directory_without_its_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000009").mkdir()
    assert checkpoints.list_checkpoints(tmp_path) == []
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoints.read_checkpoint(tmp_path / "step-000009")


def test_harmless_differences_are_told_and_others_refused_with_both_values() -> None:
    saved = {"steps": 10, "reward": {"url": ["a"]}, "ppo": {"gamma": 1.0}}
    assert checkpoints.check_same_run(saved, {**saved, "steps": 20, "resume": "auto"}) == ["steps: 10 -> 20"]
    assert checkpoints.check_same_run(saved, {**saved, "reward": {"url": ["b"]}}) == ["reward.url: ['a'] -> ['b']"]
    with pytest.raises(ConfigError, match=r"ppo\.gamma: 1\.0 -> 0\.9"):
        checkpoints.check_same_run(saved, {**saved, "ppo": {"gamma": 0.9}})


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default() -> None:
    saved: dict[str, Any] = to_dict(PPOConfig())
    del saved["model"]["compile"]
    assert checkpoints.check_same_run(saved, to_dict(PPOConfig())) == []
    with pytest.raises(ConfigError, match=r"model\.compile: False -> True"):
        checkpoints.check_same_run(saved, to_dict(PPOConfig(model=ModelSettings(compile=True))))


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"\xff\xfe",
        b"{",
        b'{"format": 1, "step": "../../etc", "config": {}, "reward_revision": null}',
        b"[" * 99999,
    ],
)
def test_a_malformed_manifest_is_one_clear_line(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(ConfigError, match=r"not a checkpoint .* name a directory checkpoints/step-NNNNNN"):
        checkpoints.read_checkpoint(tmp_path)
