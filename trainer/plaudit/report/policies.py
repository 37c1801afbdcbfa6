"""Figures of any number of policies on the same prompts, each with an interval. Pure functions of their answers.

All intervals are 95 % percentile bootstrap intervals over prompts. The number of distinct responses has none: a
bootstrap sample repeats prompts, so it always has fewer of them.

Failure mode: a comparison that is not paired by prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from plaudit.report.comparison import win_rate_by_scores
from plaudit.report.evaluation import Answers, distinct, mean_ci95, perplexity, sequence_kl

RESAMPLES = 2_000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A figure with its interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Judged:
    """A policy's scores by one reward or judge."""

    mean: Measured
    median: Measured
    win_rate: Measured | None
    """How often the score is higher than that of the policy before, prompt by prompt; a tie counts 1/2. None of the
    policy before itself."""


@dataclass(frozen=True)
class PolicyFigures:
    """One policy's figures."""

    policy: str
    reward: Judged
    kl: Measured
    """To the reference, in nats per response."""
    perplexity: Measured
    """Of the responses under the reference."""
    perplexity_ratio: Measured | None
    """To that of the policy before, paired by prompt."""
    length: Measured
    """Tokens per response."""
    distinct_responses: int
    judges: Mapping[str, Judged] = field(default_factory=dict)


def policy_figures(policy: str, answers: Answers, before: Answers | None) -> PolicyFigures:
    """The figures of one policy's answers. `before` are the answers to compare with, of the same prompts and judges."""
    kls = [own - reference for own, reference in zip(answers.logprobs, answers.reference_logprobs, strict=True)]
    logprobs, counts = np.array(answers.plain_reference_logprobs), np.array(answers.token_counts, dtype=np.float64)

    def of(weights: Array) -> Array:
        return np.asarray(np.exp(-(weights @ logprobs) / (weights @ counts)))

    ratio = None
    if before is not None:
        other_logprobs, other_counts = np.array(before.plain_reference_logprobs), np.array(before.token_counts)
        ratio = Measured(
            perplexity(answers.plain_reference_logprobs, answers.token_counts)
            / perplexity(before.plain_reference_logprobs, before.token_counts),
            weighted_ci95(len(answers), lambda w: of(w) / np.exp(-(w @ other_logprobs) / (w @ other_counts))),
        )
    return PolicyFigures(
        policy=policy,
        reward=judged(answers.rewards, None if before is None else before.rewards),
        kl=Measured(sequence_kl(answers.logprobs, answers.reference_logprobs), mean_ci95(kls)),
        perplexity=Measured(
            perplexity(answers.plain_reference_logprobs, answers.token_counts), weighted_ci95(len(answers), of)
        ),
        perplexity_ratio=ratio,
        length=_mean([float(count) for count in answers.token_counts]),
        distinct_responses=distinct(answers.texts),
        judges={
            name: judged(scores, None if before is None else before.judged[name])
            for name, scores in answers.judged.items()
        },
    )


def judged(scores: Sequence[float], before: Sequence[float] | None) -> Judged:
    """The figures of one reward's or judge's scores; `before` are those of the answers to compare with."""
    rate = None
    if before is not None:
        won = win_rate_by_scores(scores, before)
        rate = Measured(won.mean, won.ci95)
    median = Measured(float(np.median(scores)), median_ci95(scores))
    return Judged(mean=_mean(scores), median=median, win_rate=rate)


def weighted_ci95(n: int, statistic: Callable[[Array], Array]) -> tuple[float, float]:
    """Bootstrap interval of a statistic of n prompts. It takes how often each prompt was drawn, [RESAMPLES, n], and
    gives a number for each resample, [RESAMPLES]."""
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    low, high = np.quantile(statistic(weights), [0.025, 0.975])
    return float(low), float(high)


def median_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of the median."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).choice(sample, (RESAMPLES, len(sample)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _mean(values: Sequence[float]) -> Measured:
    return Measured(float(np.mean(values)), mean_ci95(values))
