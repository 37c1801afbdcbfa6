"""Settings of `plaudit evaluate-judge`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings


@dataclass(frozen=True)
class JudgeConfig:
    """Evaluate a reward model on preferences: accuracy, calibration and length bias."""

    preferences: str = ""
    """File or hub id of preferences: rankings, {"prompt", "answers"}, or chosen and rejected answers. See --ranked of
    `plaudit reward-model`."""
    split: Literal["all", "held_out"] = "all"
    """`held_out` uses only the texts that `plaudit reward-model` holds out from the same file."""
    held_out_fraction: float = 0.1
    """The held-out share that `plaudit reward-model` used."""
    limit: int | None = None
    """Maximum number of prompts. They are taken in an order that depends only on their texts."""
    output_dir: Path = Path("runs/judge-evaluation")
    """Directory for the figures."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    score_scale: float = 1.0
    """Divide scores by this before interpreting a difference as log-odds: `score_scale` in the config.json of a model
    from `plaudit reward-model`. It affects only the calibration."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        positive(self, "limit", "score_scale")
