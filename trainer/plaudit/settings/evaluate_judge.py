"""Judging a reward model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings


@dataclass(frozen=True)
class JudgeConfig:
    """Judge a reward model by preferences: how often it is right, how sure it is, and whether length decides."""

    preferences: str = ""
    """A file or hub id of preferences: rankings, {"prompt", "answers"}, or chosen and rejected answers; see the
    `--ranked` of `plaudit reward-model`."""
    split: Literal["all", "held_out"] = "all"
    """`held_out` takes the texts alone that `plaudit reward-model` holds out from the same file."""
    held_out_fraction: float = 0.1
    """The share that it held out."""
    limit: int | None = None
    """Judge the first so many prompts, in an order that depends on their texts alone."""
    output_dir: Path = Path("runs/judge-evaluation")
    reward: RewardSettings = field(default_factory=RewardSettings)
    score_scale: float = 1.0
    """Divide scores by this before reading a difference of two as log-odds: the `score_scale` in the config.json of a
    model that `plaudit reward-model` trained. It changes the calibration alone."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        positive(self, "limit", "score_scale")
