"""Metrics of a policy before and after training. Both answer the same prompts, so differences are paired."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plaudit.errors import NotFinite

RESAMPLES = 10_000


@dataclass(frozen=True)
class Answers:
    """One policy's answers to the n prompts, with rewards and log-probabilities. Index i is prompt i everywhere."""

    texts: tuple[str, ...]
    rewards: tuple[float, ...]
    logprobs: tuple[float, ...]
    """log p(response | prompt) under the sampling distribution, summed over tokens, in nats."""
    reference_logprobs: tuple[float, ...]
    """The same under the reference, with the same temperature and truncation."""
    plain_reference_logprobs: tuple[float, ...]
    """The same under the reference, without temperature and truncation."""
    token_counts: tuple[int, ...]
    judged: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Scores of further judges, by name."""

    def __post_init__(self) -> None:
        names = [each.name for each in dataclasses.fields(self) if each.name != "judged"]
        counts = {name: len(getattr(self, name)) for name in names}
        counts |= {name: len(scores) for name, scores in self.judged.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"answers must be as many in every field: {counts}")

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Summary:
    """`ci95` is the 95 % confidence interval of the mean."""

    mean: float
    median: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """After minus before, prompt by prompt."""

    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class RewardChange:
    """The rewards of both policies' answers, and their difference."""

    before: Summary
    after: Summary
    difference: Difference


@dataclass(frozen=True)
class Change:
    """One metric of both policies."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """The value after divided by the value before."""
        return self.after / self.before


@dataclass(frozen=True)
class CountChange:
    """A count for both policies."""

    before: int
    after: int


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json."""

    n: int
    reward: RewardChange
    kl: float
    """KL(after || reference) in nats, summed over a response's tokens, mean over prompts."""
    perplexity: Change
    """Perplexity of the responses under the reference: a measure of fluency."""
    distinct_responses: CountChange
    """Number of different texts among the n responses: reveals mode collapse."""

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as a nested dict, for evaluation.json."""
        return dataclasses.asdict(self)


def compare(before: Answers, after: Answers) -> Evaluation:
    """All metrics of two policies' answers to the same prompts.

    Raises:
        NotFinite: a log-probability or a reward is NaN or infinite.
    """
    for name, answers in (("before", before), ("after", after)):
        for column in ("rewards", "logprobs", "reference_logprobs", "plain_reference_logprobs"):
            for i, value in enumerate(getattr(answers, column)):
                if not math.isfinite(value):
                    raise NotFinite(
                        f"{column} of the answer {name} to prompt {i} is {value}, so no figure means anything; look at "
                        "the weights of that policy"
                    )
    if len(before) != len(after):
        raise ValueError(f"{len(before)} answers before and {len(after)} after: the comparison is paired")
    differences = [b - a for a, b in zip(before.rewards, after.rewards, strict=True)]
    return Evaluation(
        n=len(before),
        reward=RewardChange(
            before=summary(before.rewards),
            after=summary(after.rewards),
            difference=Difference(_mean(differences), mean_ci95(differences)),
        ),
        kl=sequence_kl(after.logprobs, after.reference_logprobs),
        perplexity=Change(
            perplexity(before.plain_reference_logprobs, before.token_counts),
            perplexity(after.plain_reference_logprobs, after.token_counts),
        ),
        distinct_responses=CountChange(distinct(before.texts), distinct(after.texts)),
    )


def summary(values: Sequence[float]) -> Summary:
    """Mean, median and the confidence interval of the mean."""
    return Summary(_mean(values), float(np.median(values)), mean_ci95(values))


def mean_ci95(values: Sequence[float], *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979). The same values always give the same interval."""
    sample = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(0)
    # In blocks of 1000, because all resamples at once would need a [resamples, n] array.
    means = [draw.choice(sample, (min(1000, resamples - i), len(sample))).mean(1) for i in range(0, resamples, 1000)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def sequence_kl(logprobs: Sequence[float], reference_logprobs: Sequence[float]) -> float:
    """mean_i [log p(y_i) - log p_ref(y_i)], y_i ~ p: unbiased for KL(p || p_ref) over whole responses, in nats."""
    return _mean(np.asarray(logprobs, dtype=np.float64) - np.asarray(reference_logprobs, dtype=np.float64))


def perplexity(logprobs: Sequence[float], token_counts: Sequence[int]) -> float:
    """exp(-sum_i log p(y_i) / sum_i |y_i|): every token has the same weight."""
    return math.exp(-sum(logprobs) / sum(token_counts))


def distinct(texts: Sequence[str]) -> int:
    """Number of different texts, ignoring white space at the ends."""
    return len({text.strip() for text in texts})


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.mean(values))
