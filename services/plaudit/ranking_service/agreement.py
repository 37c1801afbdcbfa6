"""Inter-annotator agreement, corrected for chance, and the reliability of each annotator. Pure functions of rankings.

A ranking of n answers is n ranks from 1 (best); equal ranks are ties. All statistics are over tasks that at least two
people have ranked.

Failure modes: a statistic that is high although the answers are random or mostly tied.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from plaudit.wire.rankings import AgreementReport, AnnotatorReport, Estimate

Rankings = Mapping[str, Sequence[int]]
"""The rankings of one task: annotator to ranks, in the same order of answers for all."""
RESAMPLES = 1000
INTERVAL = 0.95
PRIOR_COMPARISONS = 4.0
"""Beta prior of a reliability: this many correct and as many wrong comparisons are assumed beforehand."""
SCORE_PRECISION = 0.1
"""Precision (1 / variance) of the normal prior of an answer's score in Crowd-BT."""


@dataclass(frozen=True)
class PairCounts:
    """Pairs of answers that two people compared: all, those they agree on, and those expected by chance."""

    compared: int
    agreed: int
    by_chance: float


def sign(first: int, second: int) -> int:
    """1 if the first rank is better than the second, -1 if worse, 0 for a tie."""
    return (first < second) - (first > second)


def tie_rate(rankings: Iterable[Sequence[int]]) -> float | None:
    """Share of the pairs of answers that are tied; None without pairs."""
    tied = pairs = 0
    for ranks in rankings:
        for i, rank in enumerate(ranks):
            for other in ranks[i + 1 :]:
                tied += rank == other
                pairs += 1
    return tied / pairs if pairs else None


def chance_agreement(tie_rate_a: float, tie_rate_b: float) -> float:
    """How often two people who answer at random, but tie as often as these two, agree about a pair.

    Both tie with probability t_a t_b; neither does with (1 - t_a)(1 - t_b), and then half of the orders are the same:

        t_a t_b + (1 - t_a)(1 - t_b) / 2

    This is Cohen's expected agreement for the categories {better, tied, worse} when better and worse are equally
    likely, as they are when the order of the answers is shuffled (Cohen 1960, "A coefficient of agreement").
    """
    return tie_rate_a * tie_rate_b + (1 - tie_rate_a) * (1 - tie_rate_b) / 2


def pair_counts(task: Rankings, tie_rates: Mapping[str, float]) -> PairCounts:
    """Agreement of every two people on every two answers of one task."""
    compared = agreed = 0
    by_chance = 0.0
    people = sorted(task)
    for p, one in enumerate(people):
        for other in people[p + 1 :]:
            same, pairs = agreeing_pairs(task[one], task[other])
            agreed += same
            compared += pairs
            by_chance += pairs * chance_agreement(tie_rates[one], tie_rates[other])
    return PairCounts(compared, agreed, by_chance)


def agreeing_pairs(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """The number of pairs of answers on which two rankings agree (better, tied or worse), and of all pairs."""
    agreed = pairs = 0
    for i in range(len(one)):
        for j in range(i + 1, len(one)):
            agreed += sign(one[i], one[j]) == sign(other[i], other[j])
            pairs += 1
    return agreed, pairs


def tau_b(one: Sequence[int], other: Sequence[int]) -> float | None:
    """Kendall's tau-b of two rankings (Kendall 1945, "The treatment of ties in ranking problems").

        (C - D) / sqrt((n0 - n1)(n0 - n2))

    C and D count concordant and discordant pairs, n0 = n(n - 1)/2 all pairs, n1 and n2 the pairs that the one and the
    other ranking ties. None if a ranking ties everything: it has no order.
    """
    difference = untied_one = untied_other = 0
    for i in range(len(one)):
        for j in range(i + 1, len(one)):
            a, b = sign(one[i], one[j]), sign(other[i], other[j])
            difference += a * b
            untied_one += a != 0
            untied_other += b != 0
    if untied_one == 0 or untied_other == 0:
        return None
    return difference / math.sqrt(untied_one * untied_other)


def task_tau_b(task: Rankings) -> tuple[float, int, int]:
    """The sum of tau-b over every two people of one task, for how many it is defined, and for how many not."""
    total, defined, undefined = 0.0, 0, 0
    people = sorted(task)
    for p, one in enumerate(people):
        for other in people[p + 1 :]:
            tau = tau_b(task[one], task[other])
            if tau is None:
                undefined += 1
            else:
                total += tau
                defined += 1
    return total, defined, undefined


Coincidences = Mapping[tuple[int, int], float]
"""The number of times that two people gave the ranks c and k to one answer; symmetric."""


def coincidences(task: Rankings) -> Coincidences:
    """The coincidences of one task. An answer that m people ranked adds 1 / (m - 1) for each ordered pair of them."""
    counts: dict[tuple[int, int], float] = defaultdict(float)
    rankings = list(task.values())
    m = len(rankings)
    if m < 2:
        return counts
    for values in zip(*rankings, strict=True):
        seen = Counter(values)
        for c, n_c in seen.items():
            for k, n_k in seen.items():
                pairs = n_c * (n_c - 1) if c == k else n_c * n_k
                if pairs:
                    counts[c, k] += pairs / (m - 1)
    return counts


def ordinal_alpha(counted: Coincidences) -> float | None:
    """Krippendorff's alpha for ordinal values, from coincidences o_ck (Krippendorff 2011, "Computing Krippendorff's
    alpha-reliability").

        alpha = 1 - (n - 1) sum_ck o_ck d_ck / sum_ck n_c n_k d_ck
        d_ck = (n_c / 2 + sum of n_g for g strictly between c and k + n_k / 2) squared

    n_c is the sum of o_ck over k, and n the sum of n_c. The units are answers and the values their ranks. 1 is full
    agreement, 0 what chance gives. None where all values are the same.
    """
    totals: dict[int, float] = defaultdict(float)
    for (c, _), count in counted.items():
        totals[c] += count
    values = sorted(totals)
    n = sum(totals.values())
    running = {}
    below = 0.0
    for value in values:
        running[value] = below + totals[value] / 2  # d_ck is the difference of these, squared
        below += totals[value]
    observed = sum(count * (running[c] - running[k]) ** 2 for (c, k), count in counted.items())
    expected = sum(totals[c] * totals[k] * (running[c] - running[k]) ** 2 for c in values for k in values)
    if expected == 0:
        return None
    return 1 - (n - 1) * observed / expected


def add_up(parts: Iterable[Coincidences]) -> Coincidences:
    """The sum of the coincidences of several tasks."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    for part in parts:
        for cell, count in part.items():
            total[cell] += count
    return total


def bootstrap(
    n: int, statistic: Callable[[Sequence[int]], float | None], *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A statistic of n prompts with its percentile interval, by bootstrap over prompts (Efron 1979).

    `statistic` takes the indices of prompts. Resamples for which it isn't defined are left out.
    """
    value = statistic(range(n))
    if value is None:
        return Estimate(value=None, low=None, high=None)
    draw = random.Random(seed)
    drawn = sorted(again for _ in range(resamples) if (again := statistic(draw.choices(range(n), k=n))) is not None)
    tail = (1 - INTERVAL) / 2
    return Estimate(value=value, low=quantile(drawn, tail), high=quantile(drawn, 1 - tail))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted numbers, by linear interpolation."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def bradley_terry(
    n: int, wins: Mapping[tuple[int, int], float], *, precision: float, start: Sequence[float] = ()
) -> list[float]:
    """Scores s of n items from weighted wins, wins[i, j] times i over j (Bradley and Terry 1952): the maximum of

        sum_ij wins[i, j] log sigmoid(s_i - s_j) - precision / 2 sum_i s_i ^ 2

    found by Newton's method from `start`. The prior makes it unique, and finite even if an item always wins.
    """
    scores = list(start) or [0.0] * n
    for _ in range(100):
        gradient = [-precision * s for s in scores]
        hessian = [[precision if i == j else 0.0 for j in range(n)] for i in range(n)]
        for (i, j), weight in wins.items():
            p = _sigmoid(scores[i] - scores[j])
            gradient[i] += weight * (1 - p)
            gradient[j] -= weight * (1 - p)
            curvature = weight * p * (1 - p)
            hessian[i][i] += curvature
            hessian[j][j] += curvature
            hessian[i][j] -= curvature
            hessian[j][i] -= curvature
        step = _solve(hessian, gradient)
        # Far from the maximum, a full Newton step may overshoot.
        largest = max(abs(part) for part in step)
        shorten = min(1.0, 2.0 / largest) if largest else 1.0
        scores = [s + shorten * part for s, part in zip(scores, step, strict=True)]
        if largest < 1e-9:
            break
    return scores


def reliabilities(tasks: Sequence[Rankings], *, tolerance: float = 1e-5, rounds: int = 500) -> dict[str, float]:
    """Crowd-BT: Bradley-Terry scores for the answers and a reliability for each annotator, together (Chen, Bennett,
    Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in a crowdsourced setting").

        P(annotator k says i > j) = eta_k sigmoid(s_i - s_j) + (1 - eta_k) sigmoid(s_j - s_i)

    eta_k is 1 for an annotator who always follows the order, 1/2 for one who answers at random, 0 for one who inverts
    it. A tie counts as half a win each way. The maximum a posteriori is found by expectation maximisation: first the
    probability that each comparison follows the order, then scores and reliabilities given these. Priors:
    Beta(`PRIOR_COMPARISONS` + 1, `PRIOR_COMPARISONS` + 1) for eta, normal with precision `SCORE_PRECISION` for scores.
    Each task has its own scores, so only tasks with at least two people are informative.
    """
    shared = [task for task in tasks if len(task) > 1]
    comparisons = [_comparisons(task) for task in shared]
    people = sorted({annotator for task in shared for annotator in task})
    eta = dict.fromkeys(people, 0.8)
    scores = [[0.0] * len(next(iter(task.values()))) for task in shared]
    for _ in range(rounds):
        right: dict[str, float] = dict.fromkeys(people, PRIOR_COMPARISONS)
        total: dict[str, float] = dict.fromkeys(people, 2 * PRIOR_COMPARISONS)
        for number, listed in enumerate(comparisons):
            s = scores[number]
            wins: dict[tuple[int, int], float] = defaultdict(float)
            for annotator, i, j, weight in listed:
                meant = _meant(eta[annotator], s[i] - s[j])
                right[annotator] += weight * meant
                total[annotator] += weight
                wins[i, j] += weight * meant
                wins[j, i] += weight * (1 - meant)
            scores[number] = bradley_terry(len(s), wins, precision=SCORE_PRECISION, start=s)
        new = {annotator: right[annotator] / total[annotator] for annotator in people}
        moved = max((abs(new[a] - eta[a]) for a in people), default=0.0)
        eta = new
        if moved < tolerance:
            break
    return eta


def weight_of(reliability: float) -> float:
    """The weight of an annotator: 0 for one who answers at random, 1 for one who is always right."""
    return max(0.0, 2 * reliability - 1)


@dataclass(frozen=True)
class Activity:
    """One person's counts and times in a batch."""

    rankings: int
    skipped: int
    flagged: int
    seconds: Sequence[float]


def report(
    batch: str,
    tasks: Mapping[str, Rankings],
    activity: Mapping[str, Activity],
    *,
    resamples: int = RESAMPLES,
) -> AgreementReport:
    """All statistics of one batch. `tasks` maps a task to its rankings, also tasks that a single person ranked."""
    shared = [tasks[task] for task in sorted(tasks) if len(tasks[task]) > 1]
    by_person: dict[str, list[Sequence[int]]] = defaultdict(list)
    for task in tasks.values():
        for annotator, ranks in task.items():
            by_person[annotator].append(ranks)
    rates = {annotator: tie_rate(said) or 0.0 for annotator, said in by_person.items()}
    pairs = [pair_counts(task, rates) for task in shared]
    taus = [task_tau_b(task) for task in shared]
    coinciding = [coincidences(task) for task in shared]

    def agreement(chosen: Sequence[int]) -> float | None:
        compared = sum(pairs[i].compared for i in chosen)
        return sum(pairs[i].agreed for i in chosen) / compared if compared else None

    def chance(chosen: Sequence[int]) -> float | None:
        compared = sum(pairs[i].compared for i in chosen)
        return sum(pairs[i].by_chance for i in chosen) / compared if compared else None

    def kappa(chosen: Sequence[int]) -> float | None:
        observed, expected = agreement(chosen), chance(chosen)
        if observed is None or expected is None or expected == 1:
            return None
        return (observed - expected) / (1 - expected)

    def tau(chosen: Sequence[int]) -> float | None:
        defined = sum(taus[i][1] for i in chosen)
        return sum(taus[i][0] for i in chosen) / defined if defined else None

    def alpha(chosen: Sequence[int]) -> float | None:
        return ordinal_alpha(add_up(coinciding[i] for i in chosen))

    n = len(shared)
    estimates = {
        name: bootstrap(n, statistic, resamples=resamples)
        for name, statistic in (("pair_agreement", agreement), ("kappa", kappa), ("tau_b", tau), ("alpha", alpha))
    }
    eta = reliabilities(shared)
    return AgreementReport(
        batch=batch,
        rankings=sum(len(task) for task in tasks.values()),
        overlapping_tasks=n,
        pairs_compared=sum(part.compared for part in pairs),
        tie_rate=tie_rate(ranks for task in shared for ranks in task.values()),
        chance=chance(range(n)),
        tau_b_undefined=sum(part[2] for part in taus),
        annotators=[
            _annotator_report(annotator, activity[annotator], by_person[annotator], shared, eta.get(annotator))
            for annotator in sorted(activity)
        ],
        **estimates,
    )


def _annotator_report(
    annotator: str,
    did: Activity,
    said: Sequence[Sequence[int]],
    shared: Sequence[Rankings],
    reliability: float | None,
) -> AnnotatorReport:
    theirs = [task for task in shared if annotator in task]
    agreed = pairs = 0
    for task in theirs:
        for other, ranks in task.items():
            if other != annotator:
                same, compared = agreeing_pairs(task[annotator], ranks)
                agreed += same
                pairs += compared
    return AnnotatorReport(
        annotator=annotator,
        rankings=did.rankings,
        skipped=did.skipped,
        flagged=did.flagged,
        overlapping_tasks=len(theirs),
        tie_rate=tie_rate(said),
        pair_agreement=agreed / pairs if pairs else None,
        reliability=reliability,
        weight=None if reliability is None else weight_of(reliability),
        median_seconds=median(did.seconds) if did.seconds else None,
    )


def _comparisons(task: Rankings) -> list[tuple[str, int, int, float]]:
    """(annotator, winner, loser, weight) for every pair of answers; a tie is two comparisons of half the weight."""
    listed = []
    for annotator in sorted(task):
        ranks = task[annotator]
        for i in range(len(ranks)):
            for j in range(i + 1, len(ranks)):
                said = sign(ranks[i], ranks[j])
                if said >= 0:
                    listed.append((annotator, i, j, 1.0 if said else 0.5))
                if said <= 0:
                    listed.append((annotator, j, i, 1.0 if said else 0.5))
    return listed


def _meant(eta: float, difference: float) -> float:
    """The probability that a comparison follows the true order rather than inverting it."""
    p = _sigmoid(difference)
    return eta * p / (eta * p + (1 - eta) * (1 - p))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Solve a symmetric positive definite system by Gaussian elimination."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(n):
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            for column in range(i, n + 1):
                rows[k][column] -= factor * rows[i][column]
    solution = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(rows[i][k] * solution[k] for k in range(i + 1, n))
        solution[i] = (rows[i][n] - rest) / rows[i][i]
    return solution
