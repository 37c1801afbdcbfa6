"""A run of stage 3 that takes seconds, and a ranking service."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.ranking_service import KEY, RankingService
from harness.stub_reward_server import StubRewardServer
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters


@pytest.fixture
def config(policy_dir: Path, reviews: Path, stub_reward_server: StubRewardServer, tmp_path: Path) -> PPOConfig:
    """A tiny policy, rewards from the stub, a checkpoint after every one of few steps."""
    return PPOConfig(
        policy=str(policy_dir),
        output_dir=tmp_path / "run",
        dataset=DataSettings(str(reviews)),
        reward=RewardSettings.of(url=(stub_reward_server.url,), patience_s=0.5, request_timeout_s=10.0),
        ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, learning_rate=1e-3, ppo_epochs=2),
        steps=3,
        checkpoint_every=1,
        collective_timeout_s=60.0,
    )


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RankingService]:
    """A ranking service, with its key in the environment."""
    monkeypatch.setenv("RANK_API_KEY", KEY)
    running = RankingService(str(tmp_path / "service.db"))
    yield running
    running.kill()
