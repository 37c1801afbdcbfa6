"""Judging a policy before and after."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.people import PeopleSettings, check_url
from plaudit.settings.policy import GenerationSettings


@dataclass(frozen=True)
class EvaluateConfig:
    """Judge a policy before and after PPO on held-out prompts, with the same seeds."""

    after: str = "runs/ppo"
    """The directory that `plaudit ppo` wrote, or that of a whole model."""
    policy: str | None = None
    """Before: a whole model, or what `plaudit ppo` wrote; also the reference of KL and perplexity. Not given means the
    one that the adapters were trained on."""
    output_dir: Path = Path("runs/evaluation")
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    by_people: str | None = None
    """A ranking service's address (http://…): people compare both answers there, blind, in place of a reward model."""
    people: PeopleSettings = field(default_factory=PeopleSettings)
    people_patience_s: float = 3600.0
    """How long to wait for people to finish before exiting with 75; the same command goes on then. 0 doesn't wait."""
    people_poll_s: float = 5.0
    """How often to ask how far they are."""
    n_prompts: int = 256
    """Held-out prompts to answer."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "people_poll_s")
        require(self.people_patience_s >= 0, f"people_patience_s={self.people_patience_s} must be 0 or more")
        if self.by_people is not None:
            check_url("by_people", self.by_people)
            asks = self.reward.says_whom_to_ask
            require(
                not asks,
                f"by_people={self.by_people!r} and reward.url are both given; people judge or a reward model: "
                "leave one out, and evaluate twice for both",
            )
        require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
