"""How well scores order answers as people did: accuracy, calibration, and what length has to do with it. numpy alone.

Every prompt weighs 1, and intervals are by bootstrap over prompts: pairs of one prompt share its answers. What would be
wrong here: an accuracy told without what people's own disagreement allows, or one that a judge earns by counting
letters.
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
"""Of fewer, all may be right by chance once in 16 times or more often."""


@dataclass(frozen=True)
class Bin:
    """The pairs whose more probable side has a probability in one tenth of [0.5, 1]."""

    confidence: float
    """The mean of these probabilities."""
    accuracy: float
    """How often people called that side better."""
    share: float
    """Of all pairs, each prompt weighing 1."""


@dataclass(frozen=True)
class RankingFigures:
    """How well scores order pairs of answers. `accuracy` counts what people said, ties left out."""

    prompts: int
    pairs: int
    accuracy: float
    accuracy_ci95: Interval
    agreement: float | None
    """How often two people who both tell a pair apart agree about it; None where nobody shares a pair."""
    ceiling: float | None
    """The accuracy of somebody who knows the better answer of each pair, where each person is right equally often."""
    calibration_error: float
    """Expected calibration error of sigmoid(score difference) over ten bins; 0 is perfect."""
    calibration_ci95: Interval
    bins: tuple[Bin, ...]

    @property
    def at_chance(self) -> bool:
        """Whether it can't be told from guessing."""
        return self.prompts < FEWEST_PROMPTS or self.accuracy_ci95[0] <= 0.5

    def line(self) -> str:
        """For people."""
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
    """What the characters of an answer have to do with its score."""

    better_is_longer: float | None
    """The share of pairs whose better answer is the longer one, by what people said."""
    accuracy_where_longer: float | None
    """Where the better answer is the longer one; None where there is no such pair."""
    accuracy_where_longer_ci95: Interval | None
    accuracy_where_shorter: float | None
    accuracy_where_shorter_ci95: Interval | None
    correlation: float | None
    """Pearson's, of score and length, each less its mean over the prompt's answers."""
    correlation_ci95: Interval | None


def ranking_figures(
    rows: Sequence[RankedPrompt],
    scores: Sequence[Sequence[float]],
    *,
    scale: float = 1.0,
    agreement: float | None = None,
) -> RankingFigures:
    """The figures of `scores`, one for each answer of each row.

    `scale` is what scores were multiplied with after they were learnt; probabilities are of the scores before that.
    `agreement` is that of a larger set of rankings than `rows`; without it, that of `rows`.
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
    """What length has to do with `scores`, one for each answer of each row. Pairs that people split evenly are out."""
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
    """How often two people agree about a pair that both tell apart; None where there is no such pair."""
    alike = together = 0
    for row in rows:
        for pair in row.pairs:
            told = pair.wins + pair.losses
            alike += math.comb(pair.wins, 2) + math.comb(pair.losses, 2)
            together += math.comb(told, 2)
    return alike / together if together else None


def ceiling(agreement: float) -> float:
    """How often somebody is right about a pair if all are right equally often and agree this often.

    Two agree when both are right or both are wrong: a = q^2 + (1 - q)^2, so q = (1 + sqrt(2 a - 1)) / 2. No model
    predicts what people say more often than that. Below a = 1/2 there is nothing to know.
    """
    return (1 + math.sqrt(max(0.0, 2 * agreement - 1))) / 2


def _accuracy(pairs: Sequence[Pair], scores: Sequence[float]) -> float:
    """The mean over pairs of how often people said what the scores say. Equal scores are right half of the time."""
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
    """How often each of n prompts is drawn, [RESAMPLES, n]; the same for the same n."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
