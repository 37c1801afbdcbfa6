"""Settings of `plaudit evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.people import PeopleSettings, check_url
from plaudit.settings.policy import GenerationSettings


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a policy before and after PPO on the same held-out prompts, with the same seeds."""

    stage: ClassVar = "evaluate"
    """The name of its part in a settings file for all stages."""

    after: str = "runs/ppo"
    """The trained policy: an output directory of `plaudit ppo`, or a full model."""
    policy: str | None = None
    """The policy before training: a full model, or an output directory of `plaudit ppo`. It is also the reference for
    KL and perplexity. Default: the model that the adapters were trained on."""
    also: tuple[str, ...] = ()
    """Further trained policies, evaluated in the same way on the same prompts."""
    output_dir: Path = Path("runs/evaluation")
    """Directory for figures, samples and report."""
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    judges: RewardSettings = field(default_factory=RewardSettings)
    """Further judges, each reported by its name beside the reward."""
    by_people: str | None = None
    """Address of a ranking service (http://…). People compare both answers there, blind, instead of a reward model."""
    people: PeopleSettings = field(default_factory=PeopleSettings)
    people_patience_s: float = 3600.0
    """How long to wait for people before exiting with 75. The same command continues later. 0 means no waiting."""
    people_poll_s: float = 5.0
    """Interval between checks of the progress."""
    n_prompts: int = 1024
    """Number of held-out prompts. If there are fewer, all of them are used."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`. Default: a GPU if there is one."""
    seed: int = 0
    """Of sampling; the same for all policies."""

    def __post_init__(self) -> None:
        positive(self, "people_poll_s")
        require(self.people_patience_s >= 0, f"people_patience_s={self.people_patience_s} must be 0 or more")
        names = (self.after, *self.also)
        require(len(set(names)) == len(names), f"after and also, {' '.join(names)}: one policy stands twice")
        if self.by_people is not None:
            require(not self.also, f"by_people compares two policies, and also={' '.join(self.also)} names more")
            check_url("by_people", self.by_people)
            asks = self.reward.says_whom_to_ask
            require(
                not asks,
                f"by_people={self.by_people!r} and reward.url are both given; people judge or a reward model: "
                "leave one out, and evaluate twice for both",
            )
        require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
