"""Settings of `plaudit ppo` for watching a run: rollouts on disk, evaluation while training, early stopping."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings

KeptRollouts = Literal["off", "sampled", "all"]
ONE_JUDGE = "judge"
"""Name of the only further judge, if it has none of its own."""


def with_names(judges: RewardSettings) -> RewardSettings:
    """Further judges; the only one is called `judge` unless it has a name."""
    if len(judges.components) != 1 or judges.components[0].name != "reward":
        return judges
    return dataclasses.replace(judges, components=(dataclasses.replace(judges.components[0], name=ONE_JUDGE),))


@dataclass(frozen=True)
class WatchSettings:
    """What a run records about itself, and when it may stop early. Nothing here changes a training step."""

    rollouts: KeptRollouts = "off"
    """Write each step's responses to OUTPUT_DIR/rollouts as JSON lines: tokens, rewards, KL, advantage, value and more.
    `sampled` keeps rollouts_per_step of them, `all` keeps every one."""
    rollouts_per_step: int = 8
    """With rollouts=sampled: responses per step, at even distances in the batch."""
    rollout_file_mib: float = 4.0
    """Size at which the next rollout file begins. A file is replaced whole at each step, so small files are faster."""
    eval_every: int | None = None
    """Evaluate the policy on the same held-out prompts every N steps, before the first step and after the last one.
    Default: off."""
    eval_prompts: int = 256
    """Number of held-out prompts in each evaluation."""
    judges: RewardSettings = field(default_factory=RewardSettings)
    """Further judges of the held-out answers. The policy never learns from them, so they can show that it learns to
    please the reward model alone."""
    best_by: str = "reward"
    """The figure by which the best evaluation is kept in OUTPUT_DIR/best: `reward`, `win_rate`, or with further judges
    `NAME/reward` and `NAME/win_rate`."""
    stop_patience: int | None = None
    """Stop after this many evaluations in a row without a new best."""
    stop_kl: float | None = None
    """Stop when the held-out KL to the reference exceeds this, in nats per response."""
    stop_target: float | None = None
    """Stop when the figure named by best_by reaches this."""

    def __post_init__(self) -> None:
        positive(self, "rollouts_per_step", "rollout_file_mib", "eval_every", "stop_patience", "stop_kl")
        require(self.eval_prompts >= 2, f"eval_prompts={self.eval_prompts} must be 2 or more")
        names = self.figures
        require(
            self.best_by in names, f"best_by={self.best_by!r}: there is no such figure; there are {', '.join(names)}"
        )
        for name in ("stop_patience", "stop_kl", "stop_target"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), f"{name}={value} must be finite")
            require(
                value is None or self.eval_every is not None, f"{name}={value} needs evaluations: give watch.eval_every"
            )

    @property
    def named_judges(self) -> RewardSettings:
        """`judges`; the only one is called `judge` unless it has a name."""
        return with_names(self.judges)

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures that `best_by` may name."""
        judges = [component.name for component in self.named_judges.components]
        return ("reward", "win_rate", *(f"{name}/{figure}" for name in judges for figure in ("reward", "win_rate")))
