"""Metrics of a reward model on people's preferences: accuracy, calibration and length bias. Needs only numpy.

Every prompt has weight 1. Intervals are bootstraps over prompts, because pairs of one prompt share its answers. Failure
modes: an accuracy reported without the ceiling set by people's disagreement; an accuracy due to a length bias.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from plaudit.data.preferences import Pair, RankedPrompt
from plaudit.report.evaluation import mean_ci95

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Interval: TypeAlias = tuple[float, float]

BINS = 10
RESAMPLES = 2_000
FEWEST_PROMPTS = 5
"""With fewer prompts, all are right by chance with a probability of 1/16 or more."""


@dataclass(frozen=True)
class Bin:
    """One calibration bin: the pairs whose predicted probability falls into one tenth of [0.5, 1]."""

    confidence: float
    """The mean of these probabilities."""
    accuracy: float
    """How often people preferred the predicted answer."""
    share: float
    """Share of all pairs, with weight 1 for each prompt."""


@dataclass(frozen=True)
class RankingFigures:
    """How well scores order pairs of answers. `accuracy` is measured against people's preferences without ties."""

    prompts: int
    pairs: int
    accuracy: float
    accuracy_ci95: Interval
    agreement: float | None
    """How often two people who both prefer one answer of a pair agree; None if no two people share a pair."""
    ceiling: float | None
    """The highest possible accuracy, assuming that all people are right equally often."""
    calibration_error: float
    """Expected calibration error of sigmoid(score difference) over ten bins; 0 is perfect."""
    calibration_ci95: Interval
    bins: tuple[Bin, ...]

    @property
    def at_chance(self) -> bool:
        """Whether the accuracy can't be distinguished from guessing."""
        return self.prompts < FEWEST_PROMPTS or self.accuracy_ci95[0] <= 0.5

    def line(self) -> str:
        """The metrics in one line."""
        low, high = self.accuracy_ci95
        ceiling = (
            "no pair was told apart by two people, so nobody knows how much is possible"
            if self.ceiling is None or self.agreement is None
            else f"people agree on {self.agreement:.3f} of what two of them tell apart, so about {self.ceiling:.3f} is "
            "possible"
        )
        return (
            f"accuracy {self.accuracy:.3f} (95 % interval {low:.3f} to {high:.3f}; {ceiling}), "
            f"calibration error {self.calibration_error:.3f}, n={self.pairs} pairs of {self.prompts} prompts"
        )


@dataclass(frozen=True)
class LengthBias:
    """The relation between an answer's length in characters and its score."""

    better_is_longer: float | None
    """Share of pairs in which people preferred the longer answer."""
    accuracy_where_longer: float | None
    """Accuracy on pairs whose better answer is the longer one; None if there are none."""
    accuracy_where_longer_ci95: Interval | None
    accuracy_where_shorter: float | None
    accuracy_where_shorter_ci95: Interval | None
    correlation: float | None
    """Pearson correlation of score and length within prompts: both are centred on the prompt's mean."""
    correlation_ci95: Interval | None


def ranking_figures(
    rows: Sequence[RankedPrompt],
    scores: Sequence[Sequence[float]],
    *,
    scale: float = 1.0,
    agreement: float | None = None,
) -> RankingFigures:
    """The metrics of `scores`, one score for each answer of each row.

    Scores are divided by `scale`, the factor applied after training, to compute probabilities. `agreement` may come
    from a larger set of rankings; by default it is that of `rows`.
    """
    accuracies = [_accuracy(row.pairs, given) for row, given in zip(rows, scores, strict=True)]
    confidence, correct, weight = (np.zeros((len(rows), BINS)) for _ in range(3))
    for n, (row, given) in enumerate(zip(rows, scores, strict=True)):
        for pair in row.pairs:
            probability = _sigmoid((given[pair.first] - given[pair.second]) / scale - pair.margin)
            sure = max(probability, 1 - probability)
            b = min(int((sure - 0.5) * 2 * BINS), BINS - 1)
            share = 1 / len(row.pairs)
            confidence[n, b] += share * sure
            correct[n, b] += share * (_wins(pair) if probability >= 0.5 else 1 - _wins(pair))
            weight[n, b] += share
    gaps = correct - confidence
    drawn = _resamples(len(rows))
    errors = np.abs(drawn @ gaps).sum(1) / len(rows)
    filled = weight.sum(0) > 0
    found = agreement if agreement is not None else pair_agreement(rows)
    return RankingFigures(
        prompts=len(rows),
        pairs=sum(len(row.pairs) for row in rows),
        accuracy=float(np.mean(accuracies)),
        accuracy_ci95=mean_ci95(accuracies),
        agreement=found,
        ceiling=None if found is None else ceiling(found),
        calibration_error=float(np.abs(gaps.sum(0)).sum() / len(rows)),
        calibration_ci95=_interval(errors),
        bins=tuple(
            Bin(
                float(confidence[:, b].sum() / weight[:, b].sum()),
                float(correct[:, b].sum() / weight[:, b].sum()),
                float(weight[:, b].sum() / len(rows)),
            )
            for b in range(BINS)
            if filled[b]
        ),
    )


def length_bias(rows: Sequence[RankedPrompt], scores: Sequence[Sequence[float]]) -> LengthBias:
    """The length bias of `scores`, one score for each answer of each row. Evenly split pairs are left out."""
    longer: list[float] = []
    where: dict[bool, list[float]] = {True: [], False: []}
    sums = np.zeros((len(rows), 3))
    for n, (row, given) in enumerate(zip(rows, scores, strict=True)):
        lengths = np.array([len(answer) for answer in row.answers], dtype=np.float64)
        values = np.array(given, dtype=np.float64)
        x, y = values - values.mean(), lengths - lengths.mean()
        sums[n] = x @ y, x @ x, y @ y
        sums[n] /= len(row.answers)
        of_prompt: dict[bool, list[Pair]] = {True: [], False: []}
        for pair in row.pairs:
            difference = lengths[pair.first] - lengths[pair.second]
            if pair.wins != pair.losses and difference:
                of_prompt[(pair.wins > pair.losses) == (difference > 0)].append(pair)
        told = sum(map(len, of_prompt.values()))
        if told:
            longer.append(len(of_prompt[True]) / told)
        for is_longer, pairs in of_prompt.items():
            if pairs:
                where[is_longer].append(_accuracy(pairs, given))
    correlations = [_correlation(*row) for row in _resamples(len(rows)) @ sums]
    correlation = _correlation(*sums.sum(0))
    defined = [value for value in correlations if value is not None]
    return LengthBias(
        better_is_longer=float(np.mean(longer)) if longer else None,
        accuracy_where_longer=float(np.mean(where[True])) if where[True] else None,
        accuracy_where_longer_ci95=mean_ci95(where[True]) if where[True] else None,
        accuracy_where_shorter=float(np.mean(where[False])) if where[False] else None,
        accuracy_where_shorter_ci95=mean_ci95(where[False]) if where[False] else None,
        correlation=correlation,
        correlation_ci95=_interval(np.array(defined)) if correlation is not None and defined else None,
    )


def pair_agreement(rows: Sequence[RankedPrompt]) -> float | None:
    """How often two people agree on a pair of which both prefer one answer; None if there is no such pair."""
    alike = together = 0
    for row in rows:
        for pair in row.pairs:
            told = pair.wins + pair.losses
            alike += math.comb(pair.wins, 2) + math.comb(pair.losses, 2)
            together += math.comb(told, 2)
    return alike / together if together else None


def ceiling(agreement: float) -> float:
    """The probability q that a person is right, if all are right equally often and agree with probability a.

    Two people agree if both are right or both are wrong: a = q^2 + (1 - q)^2, so q = (1 + sqrt(2 a - 1)) / 2. No model
    predicts preferences with a higher accuracy. For a <= 1/2 the result is 1/2.
    """
    return (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def _accuracy(pairs: Sequence[Pair], scores: Sequence[float]) -> float:
    """The mean over pairs of how often people agree with the scores. Equal scores count 1/2."""
    shares = []
    for pair in pairs:
        difference = scores[pair.first] - scores[pair.second]
        shares.append(0.5 if difference == 0 else _wins(pair) if difference > 0 else 1 - _wins(pair))
    return float(np.mean(shares))


def _wins(pair: Pair) -> float:
    return pair.wins / (pair.wins + pair.losses)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _correlation(xy: float, xx: float, yy: float) -> float | None:
    return float(xy / math.sqrt(xx * yy)) if xx > 0 and yy > 0 else None


def _resamples(n: int) -> Array:
    """How often each of n prompts is drawn, [RESAMPLES, n]. The result is fixed for each n."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
