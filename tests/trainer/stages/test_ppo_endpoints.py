"""PPO against an endpoint of every kind: each sample is trained on the logit that its own text has, and on no other."""

from pathlib import Path
from typing import Any

import pytest

from harness.foreign import stand_ins as foreign
from plaudit.learner import rollout
from plaudit.learner.rollout import CollectedRollout
from plaudit.rewards.settings import RewardSettings
from plaudit.run.metrics import REWARD_MEAN, read_metrics
from plaudit.settings.data import DataSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters
from plaudit.stages import ppo


@pytest.mark.parametrize("kind", foreign.SPOKEN)
def test_every_sample_is_trained_on_the_logit_of_its_text(
    kind: str, policy_dir: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, changes = foreign.SPOKEN[kind]
    steps: list[CollectedRollout] = []
    collect = rollout.collect_rollout

    def kept(*arguments: Any, **named: Any) -> CollectedRollout:
        steps.append(collect(*arguments, **named))
        return steps[-1]

    monkeypatch.setattr(rollout, "collect_rollout", kept)
    with foreign.serving(server) as url:
        config = PPOConfig(
            policy=str(policy_dir),
            output_dir=tmp_path / "run",
            dataset=DataSettings(str(reviews)),
            reward=RewardSettings.of(url=(url,), kind=kind, chunk_size=3, **changes),
            ppo=PPOHyperparameters(batch_size=8, mini_batch_size=4, ppo_epochs=1),
            steps=2,
        )
        ppo.run(config)
    assert len(steps) == 2
    for step, metrics in zip(steps, read_metrics(config.output_dir / "metrics.jsonl"), strict=True):
        expected = [foreign.logits(p + r)[1] for p, r in zip(step.prompts, step.responses, strict=True)]
        assert step.rollout.scores.tolist() == pytest.approx(expected)
        assert metrics[REWARD_MEAN] == pytest.approx(sum(expected) / len(expected))
