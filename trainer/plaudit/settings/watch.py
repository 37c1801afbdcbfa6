"""Settings of `plaudit ppo` for watching a run: rollouts on disk."""

from dataclasses import dataclass
from typing import Literal

from plaudit.checks import positive

KeptRollouts = Literal["off", "sampled", "all"]


@dataclass(frozen=True)
class WatchSettings:
    """What a run records about itself. Nothing here changes the training."""

    rollouts: KeptRollouts = "off"
    """Write each step's responses to OUTPUT_DIR/rollouts as JSON lines: tokens, rewards, KL, advantage, value and more.
    `sampled` keeps rollouts_per_step of them, `all` keeps every one."""
    rollouts_per_step: int = 8
    """With rollouts=sampled: responses per step, at even distances in the batch."""
    rollout_file_mib: float = 4.0
    """Size at which the next rollout file begins. A file is replaced whole at each step, so small files are faster."""

    def __post_init__(self) -> None:
        positive(self, "rollouts_per_step", "rollout_file_mib")
