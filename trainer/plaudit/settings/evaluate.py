"""Judging a policy before and after."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.rewards.settings import RewardSettings
from plaudit.settings.checks import require
from plaudit.settings.data import Data, DataSettings, PromptSettings
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
    n_prompts: int = 256
    """Held-out prompts to answer."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
