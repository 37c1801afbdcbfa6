"""PPO while its reward servers die: the weights are those of an undisturbed run, or the run stops and resumes to them.

The stub's reward is a function of the text and the CPU's arithmetic repeats, so one lost, repeated or invented reward
would show in every weight after it.
"""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.runs import assert_same, weights
from tests.support.stub_reward_server import StubRewardServer
from tests.support.tiny_models import tiny_gpt2_dir
from trainer.config import DataSettings, PPOConfig, PPOHyperparameters, RewardSettings
from trainer.reward_client import RewardUnavailable, source
from trainer.rollout import Rewarder
from trainer.stages import ppo

Start = Callable[[], StubRewardServer]
STEPS = 4


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WAIT_MAX_S", 0.2)
    monkeypatch.setattr(source, "WAIT_JITTER_S", 0.05)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    directory = tmp_path_factory.mktemp("chaos")
    with (directory / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(200):
            rows.writerow([f"Film {i} is {'good' if i % 2 else 'bad'}. " + "The acting is moving. " * 12, i % 2])
    return PPOConfig(
        policy=str(tiny_gpt2_dir(directory / "policy")),
        output_dir=directory / "undisturbed",
        dataset=DataSettings(str(directory / "reviews.csv")),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=2),
        steps=STEPS,
        checkpoint_every=1,
    )


def against(config: PPOConfig, directory: Path, *servers: StubRewardServer, patience_s: float = 120.0) -> PPOConfig:
    reward = RewardSettings(url=tuple(s.url for s in servers), patience_s=patience_s, chunk_size=4)
    return dataclasses.replace(config, output_dir=directory, reward=reward)


@pytest.fixture(scope="module")
def undisturbed(base: PPOConfig) -> dict[str, torch.Tensor]:
    server = StubRewardServer()
    try:
        return weights(ppo.run(against(base, base.output_dir, server)).output_dir)
    finally:
        server.kill()


def before_each_request(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[int], None]) -> None:
    """Calls `disturb` with 0, 1, ... just before the trainer asks for a step's rewards."""
    asked = 0
    submit = ppo.RewardClient.submit_components

    def disturbed(self: Rewarder, *arguments: list[str]) -> object:
        nonlocal asked
        asked += 1
        disturb(asked - 1)
        return submit(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ppo.RewardClient, "submit_components", disturbed)


def test_a_server_killed_and_restarted_in_mid_run_changes_no_weight(
    base: PPOConfig,
    undisturbed: dict[str, torch.Tensor],
    stub_reward_server: StubRewardServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def restart(step: int) -> None:
        stub_reward_server.kill()
        stub_reward_server.start()
        stub_reward_server.script([{"do": "status", "status": 503}, {"do": "reset"}, {"do": "cut"}])

    before_each_request(monkeypatch, restart)
    result = ppo.run(against(base, tmp_path / "run", stub_reward_server))
    assert_same(weights(result.output_dir), undisturbed)


def test_one_of_two_replicas_killed_for_good_changes_no_weight(
    base: PPOConfig,
    undisturbed: dict[str, torch.Tensor],
    start_stub: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = start_stub(), start_stub()
    before_each_request(monkeypatch, lambda step: first.kill() if step == 1 else None)
    result = ppo.run(against(base, tmp_path / "run", first, second))
    assert_same(weights(result.output_dir), undisturbed)


def test_both_replicas_killed_for_longer_than_the_patience_and_a_resume_give_the_undisturbed_weights(
    base: PPOConfig,
    undisturbed: dict[str, torch.Tensor],
    start_stub: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = [start_stub(), start_stub()]

    def kill_all(step: int) -> None:
        if step == 2:
            for server in servers:
                server.kill()

    config = against(base, tmp_path / "run", *servers, patience_s=1.0)
    with monkeypatch.context() as disturbed:
        before_each_request(disturbed, kill_all)
        with pytest.raises(RewardUnavailable) as caught:
            ppo.run(config)
    assert "--resume auto" in " ".join(caught.value.__notes__)
    for server in servers:
        server.start()
    result = ppo.run(dataclasses.replace(config, resume="auto"))
    assert_same(weights(result.output_dir), undisturbed)
