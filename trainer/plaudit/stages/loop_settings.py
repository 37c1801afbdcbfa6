"""The settings of every stage of a round, from the loop's. Only here is said which directory feeds which stage."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plaudit import demo_models
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.data import DataSettings
from plaudit.settings.evaluate import EvaluateConfig
from plaudit.settings.loop import LoopConfig
from plaudit.settings.people import PeopleSettings
from plaudit.settings.ppo import PPOConfig
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sample import SampleConfig

STAGE_1 = "stage 1"


@dataclass(frozen=True)
class Ranking:
    """The ranking service that the loop talks to."""

    url: str
    api_key_file: Path | None


@dataclass(frozen=True)
class Round:
    """One round: its number from 1 on, where it is, and the settings of its stages."""

    config: LoopConfig
    number: int
    batch_prefix: str

    @property
    def name(self) -> str:
        """Of the round, its directory and its batch."""
        return f"round-{self.number}"

    @property
    def batch(self) -> str:
        """The round's batch in the ranking service."""
        return f"{self.batch_prefix}-{self.name}"

    @property
    def directory(self) -> Path:
        """Where the round's stages write."""
        return self.config.output_dir / self.name

    @property
    def before(self) -> "Round | None":
        """The round before."""
        return dataclasses.replace(self, number=self.number - 1) if self.number > 1 else None

    @property
    def trained(self) -> str:
        """The policy that this round trains."""
        return str(self.directory / "ppo")

    @property
    def reward_model_dir(self) -> Path:
        """Where this round's reward model is."""
        return self.directory / "reward-model"

    def policies_before(self) -> dict[str, str]:
        """Whom this round's policy is compared with, by name: stage 1, and the round before."""
        before = self.before
        known = {STAGE_1: self.config.policy}
        return known if before is None else known | {before.name.replace("-", " "): before.trained}

    def sample(self, ranking: Ranking) -> SampleConfig:
        """The newest policy answers prompts that no earlier round asked about."""
        config = self.config
        return SampleConfig(
            policy=config.policy if self.before is None else self.before.trained,
            to=ranking.url,
            output_dir=self.directory / "answers",
            k=config.sample.k,
            n=config.sample.n,
            skip=(self.number - 1) * config.sample.n,
            round=self.number,
            people=self._people(ranking),
            **self._shared(),
        )

    def annotate(self, ranking: Ranking) -> AnnotateConfig:
        """Simulated people; the same ones in every round."""
        config, people = self.config, self.config.simulated
        assert config.judge is not None
        return AnnotateConfig(
            url=ranking.url,
            api_key_file=ranking.api_key_file,
            judge=None if config.judge_is_service else config.judge,
            reward=self.judged_by(config.judge) if config.judge_is_service else RewardSettings(),
            label=config.judge_label,
            annotators=people.annotators,
            temperature=(people.temperature,),
            tie_margin=(people.tie_margin,),
            carelessness=(people.carelessness,),
            skips=(people.skips,),
            device=config.device,
            seed=config.seed,
        )

    def reward_model(self, ranking: Ranking) -> RewardModelConfig:
        """All rounds' rankings; scaled on what stage 1 answered, since stage 1 is PPO's reference."""
        config = self.config
        own = dict(vars(config.reward_model))
        fraction = own.pop("held_out_fraction")
        first = dataclasses.replace(self, number=1)
        return RewardModelConfig(
            **own
            | {
                "kind": "pairwise",
                "model": config.reward_model.model or config.policy,
                "output_dir": self.reward_model_dir,
                "dataset": DataSettings(held_out_fraction=fraction),
                "ranked": ranking.url,
                "batches": tuple(dataclasses.replace(self, number=n).batch for n in range(1, self.number + 1)),
                "api_key_file": ranking.api_key_file,
                "patience_s": config.people.patience_s,
                "scale_on": str(first.sample(ranking).file),
                "resume": "auto",
                "seed": config.seed,
            }
        )

    def ppo(self, reward: RewardSettings) -> PPOConfig:
        """From stage 1's weights, whatever the round."""
        config = self.config
        return PPOConfig(
            policy=config.policy,
            output_dir=Path(self.trained),
            reward=reward,
            lora=config.lora,
            model=config.model,
            penalties=config.penalties,
            ppo=config.ppo,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            resume="auto",
            **self._shared() | {"seed": config.seed + self.number - 1},
        )

    def evaluate(self, policy: str, reward: RewardSettings, directory: str) -> EvaluateConfig:
        """This round's policy against another one, on the same held-out prompts in every round."""
        config = self.config
        return EvaluateConfig(
            policy=policy,
            after=self.trained,
            output_dir=self.directory / directory,
            reward=reward,
            n_prompts=config.n_prompts,
            **self._shared(),
        )

    def judged_by(self, url: str) -> RewardSettings:
        """The hidden judge's scores, from a service at this address."""
        return dataclasses.replace(
            RewardSettings.of(url=(url,), label=self._judge_label()), patience_s=self.config.reward.patience_s
        )

    def _shared(self) -> dict[str, Any]:
        """The settings that every stage with a policy has in common with the loop."""
        return {name: getattr(self.config, name) for name in ("dataset", "prompts", "generation", "device", "seed")}

    def _judge_label(self) -> str | None:
        assert self.config.judge is not None
        file = Path(demo_models.resolve(self.config.judge)) / "config.json"
        if self.config.judge_is_service or not file.is_file():
            return self.config.judge_label
        labels = json.loads(file.read_text(encoding="utf-8")).get("id2label", {})
        return None if len(labels) == 1 else self.config.judge_label

    def _people(self, ranking: Ranking) -> PeopleSettings:
        return dataclasses.replace(self.config.people, batch=self.batch, api_key_file=ranking.api_key_file)
