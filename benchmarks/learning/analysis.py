"""The statistics of comparisons between runs: per seed over prompts, pooled over seeds, and at equal KL.

Failure mode: a comparison at a KL that one of the runs never reached.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from plaudit.report.evaluation import mean_ci95


@dataclass(frozen=True)
class Judged:
    """A policy on the held-out prompts."""

    kl: float
    """To the reference: nats a response, mean over prompts."""
    rewards: Sequence[float]
    """Of each prompt's response."""

    @property
    def reward(self) -> float:
        """The mean over prompts."""
        return statistics.fmean(self.rewards)


Curve = Sequence[Judged]
"""A run's checkpoints on the held-out prompts, the policy before training first."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def over_prompts(one: Sequence[float], other: Sequence[float]) -> Interval:
    """`one` minus `other`, prompt by prompt; percentile bootstrap."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    return Interval(statistics.fmean(differences), *mean_ci95(differences))


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a few values by Student's t. A single value has no interval: its bounds are NaN."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def common_kl(one: Curve, other: Curve) -> float:
    """The greatest KL that both runs reached."""
    return min(max(judged.kl for judged in curve) for curve in (one, other))


def rewards_at(curve: Curve, kl: float) -> list[float]:
    """Each prompt's reward where the run first reaches this KL, linear in KL between two checkpoints.

    Raises:
        ValueError: the run never reaches it.
    """
    for before, after in itertools.pairwise(curve):
        if before.kl <= kl <= after.kl:
            share = (kl - before.kl) / (after.kl - before.kl) if after.kl > before.kl else 0.0
            return [float(value) for value in (1 - share) * np.array(before.rewards) + share * np.array(after.rewards)]
    raise ValueError(f"no checkpoint reaches a KL of {kl:.2f}: {[round(judged.kl, 2) for judged in curve]}")
