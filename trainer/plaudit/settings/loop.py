"""Rounds of sampling, ranking, reward model and PPO."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import fraction, positive, require
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.settings.annotate import AnnotateConfig
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.people import PeopleSettings, check_url
from plaudit.settings.policy import GenerationSettings, LoraSettings, ModelSettings
from plaudit.settings.ppo import PenaltySettings, PPOHyperparameters
from plaudit.settings.reward_model import RewardModelConfig
from plaudit.settings.sample import SampleConfig
from plaudit.settings.supervised import OptimizerSettings


@dataclass(frozen=True)
class SamplingSettings:
    """What is asked in each round."""

    n: int = 768
    """Prompts in each round; no round asks about a prompt of an earlier one."""
    k: int = 4
    """Answers to each prompt."""

    def __post_init__(self) -> None:
        SampleConfig(n=self.n, k=self.k)


@dataclass(frozen=True)
class RankingRewardModelSettings:
    """How the reward model learns, from all rounds' rankings; see `plaudit reward-model --help`."""

    model: str | None = None
    """Directory or hub id that every round starts from; the policy of stage 1 unless given."""
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(learning_rate=2e-5, epochs=2))
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enabled=False))
    max_length: int = 256
    weights: Literal["equal", "reliability"] = "equal"
    """What a person's word is worth."""
    held_out_fraction: float = 0.1
    """The share of ranked prompts that the model is judged by."""
    center_rewards_coefficient: float = 0.0
    allow_chance: bool = False
    """Go on to PPO even if the model can't be told from guessing on held-out pairs."""
    chat_template: str | None = None
    half_precision: bool = False
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        positive(self, "max_length", "checkpoint_every")
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")


@dataclass(frozen=True)
class SimulatedPeople:
    """Simulated annotators in place of people; see `plaudit annotate --help`. They rank by `judge`."""

    annotators: int = 0
    """How many; 0 means that people rank."""
    temperature: float = 0.2
    """How noisily they judge, in the score's units."""
    tie_margin: float = 0.0
    """Answers whose noisy scores lie this close together get the same rank."""
    carelessness: float = 0.0
    """Share of the tasks that they rank at random."""
    skips: float = 0.0
    """Share of the tasks that they skip."""

    def __post_init__(self) -> None:
        require(self.annotators >= 0, f"annotators={self.annotators} must be 0 (people rank) or more")
        fraction(self, "carelessness", "skips")
        AnnotateConfig(temperature=(self.temperature,), tie_margin=(self.tie_margin,))


@dataclass(frozen=True)
class LoopConfig:
    """Sampling, ranking by people, reward model, PPO, evaluation: and again, with the newest policy's answers."""

    policy: str = "runs/sft"
    """Stage 1: directory or hub id of the language model. It answers in the first round, and PPO starts from it in
    every round."""
    output_dir: Path = Path("runs/loop")
    """Where everything goes; `round-N` holds each round's stages."""
    rounds: int = 2
    """Rounds of ranking, reward model and PPO."""
    resume: str | None = None
    """`auto` goes on with what is in output_dir, if there is something. Finished stages are not repeated."""
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    sample: SamplingSettings = field(default_factory=SamplingSettings)
    rank_url: str | None = None
    """The ranking service's address (http://…). Simulated people need none: the loop starts one for them."""
    people: PeopleSettings = field(default_factory=PeopleSettings)
    """What is asked of people. Batches are called `BATCH-round-1` and so on, after people.batch or the name of
    output_dir."""
    people_patience_s: float = 3600.0
    """How long to wait for people to finish before exiting with 75; the same command goes on then. 0 doesn't wait."""
    people_poll_s: float = 5.0
    """How often to ask how far they are."""
    simulated: SimulatedPeople = field(default_factory=SimulatedPeople)
    judge: str | None = None
    """Directory of a classifier, or a reward endpoint (http://…): what simulated people think good. If it is given,
    policies are also compared by its scores, without noise."""
    judge_label: str = "POSITIVE"
    """Whose raw logit the judge's score is; a model with one logit has that one."""

    reward_model: RankingRewardModelSettings = field(default_factory=RankingRewardModelSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    """Reward services that run already, each of them by its own address; none means that the loop starts one."""
    admin_key_file: Path | None = None
    """File with the administrator's key of those services, which a reload wants; or REWARD_ADMIN_KEY in the
    environment."""
    reload_patience_s: float = 600.0
    """How long those services may take until all of them serve the round's reward model."""
    ready_timeout_s: float = 120.0
    """How long a service that the loop starts may take."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    penalties: PenaltySettings = field(default_factory=PenaltySettings)
    ppo: PPOHyperparameters = field(default_factory=PPOHyperparameters)
    steps: int | None = None
    """PPO steps in each round; not given means one pass over the prompts."""
    checkpoint_every: int = 50
    """PPO steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of each round's newest PPO checkpoints stay."""
    n_prompts: int = 256
    """Held-out prompts to compare policies on."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0
    """Of all stages."""

    def __post_init__(self) -> None:
        positive(self, "rounds", "people_poll_s", "reload_patience_s", "ready_timeout_s", "steps", "checkpoint_every")
        positive(self, "keep_checkpoints")
        require(self.people_patience_s >= 0, f"people_patience_s={self.people_patience_s} must be 0 or more")
        require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
        require(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        require(
            self.resume in (None, "auto"),
            f"resume={self.resume!r} must be auto: a loop goes on with all that is in its output_dir",
        )
        if self.rank_url is not None:
            check_url("rank_url", self.rank_url)
        require(
            self.simulated.annotators == 0 or self.judge is not None,
            f"simulated.annotators={self.simulated.annotators} rank by a judge: name a classifier's directory or a "
            "reward endpoint with --judge",
        )
        require(
            not 0 < self.simulated.annotators < self.people.overlap or self.people.overlap_share == 0,
            f"simulated.annotators={self.simulated.annotators} can't give the {self.people.overlap} rankings that "
            "people.overlap asks of a task: simulate more, or lower --people.overlap",
        )
        require(
            len(self.reward.components) <= 1 and not any(component.function for component in self.reward.components),
            "reward has several parts or a function, and the loop's only reward is the model that it trains: name "
            "nothing but its services' addresses, --reward.url",
        )
        RewardModelConfig(max_length=self.reward_model.max_length)

    @property
    def judge_is_service(self) -> bool:
        """Whether the judge is asked over HTTP."""
        return self.judge is not None and "://" in self.judge

    @property
    def batch(self) -> str:
        """What the batches' names begin with."""
        return self.people.batch or self.output_dir.name

    @property
    def reward_urls(self) -> tuple[str, ...]:
        """The reward services that run already."""
        return tuple(url for component in self.reward.components for url in component.url)

    def reward_from(self, *urls: str) -> RewardSettings:
        """The loop's reward, which is its model's only logit, from these services."""
        first = self.reward.components[0] if self.reward.components else RewardComponent()
        kept = {"url": urls, "label": None, "name": "reward"}
        return RewardSettings(**(vars(self.reward) | {"components": (type(first)(**(vars(first) | kept)),)}))
