"""Comparison of policies by people: win rates and Bradley-Terry scores. Pure functions of rankings, with numpy only.

Every comparison is paired: answers to the same prompt, ranked by the same person. Failure modes: a tie counts for one
side; a prompt has more weight because more people ranked it; an interval is computed over rankings instead of prompts,
which is too narrow if several people rank a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from plaudit.report.evaluation import mean_ci95

Array: TypeAlias = NDArray[np.float64]

RESAMPLES = 2_000
MAX_ITERATIONS = 100_000
TOLERANCE = 1e-12


class NoMaximum(ValueError):
    """The likelihood has no maximum: some policies never lost to the others, or were never compared with them."""


@dataclass(frozen=True)
class Judgement:
    """One person's ranking of the answers to one prompt."""

    prompt: str
    """Identifies the prompt, the unit of the bootstrap."""
    policies: tuple[str, ...]
    """The policy that wrote answer i."""
    ranks: tuple[int, ...]
    """The rank of answer i: 1 is best, equal ranks are ties."""

    def __post_init__(self) -> None:
        if len(self.policies) != len(self.ranks):
            raise ValueError(f"prompt {self.prompt!r} has {len(self.policies)} policies and {len(self.ranks)} ranks")


@dataclass(frozen=True)
class WinRate:
    """How often one policy's answer beats another's: a win counts 1, a tie 1/2, a loss 0."""

    prompts: int
    mean: float
    ci95: tuple[float, float]
    """By bootstrap over prompts."""
    wins: float
    ties: float
    losses: float
    """Shares of the prompts, averaged over people within each prompt. They add up to 1."""


@dataclass(frozen=True)
class Strength:
    """A policy's Bradley-Terry score in log-odds, with a mean of 0 over the policies."""

    policy: str
    score: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Strengths:
    """Scores of all policies, best first. Intervals exclude the `undefined` resamples, whose likelihood has no
    maximum."""

    policies: tuple[Strength, ...]
    resamples: int
    undefined: int


@dataclass(frozen=True)
class Comparisons:
    """Every pair of policies on every prompt.

    `wins[p, i, j]` is how often policy i beat policy j on prompt p, where a tie counts 1/2, averaged over people and
    pairs of answers; `ties` likewise. `met[p, i, j]` is 1 if the two were compared on the prompt, else 0.
    """

    policies: tuple[str, ...]
    prompts: tuple[str, ...]
    wins: Array
    ties: Array
    met: Array


def comparisons(judgements: Sequence[Judgement]) -> Comparisons:
    """Judgements as a table, averaged over people within a prompt, so that each prompt has weight 1."""
    policies = tuple(sorted({policy for judgement in judgements for policy in judgement.policies}))
    prompts = tuple(sorted({judgement.prompt for judgement in judgements}))
    place = {policy: i for i, policy in enumerate(policies)}
    row = {prompt: i for i, prompt in enumerate(prompts)}
    wins, ties, pairs = (np.zeros((len(prompts), len(policies), len(policies))) for _ in range(3))
    for said in judgements:
        p = row[said.prompt]
        for a, (policy, rank) in enumerate(zip(said.policies, said.ranks, strict=True)):
            for other, other_rank in zip(said.policies[a + 1 :], said.ranks[a + 1 :], strict=True):
                i, j = place[policy], place[other]
                if i == j:
                    continue
                won = 0.5 if rank == other_rank else float(rank < other_rank)
                wins[p, i, j] += won
                wins[p, j, i] += 1 - won
                for one, two in ((i, j), (j, i)):
                    ties[p, one, two] += rank == other_rank
                    pairs[p, one, two] += 1
    met = (pairs > 0).astype(np.float64)
    times = np.maximum(pairs, 1)
    return Comparisons(policies, prompts, wins / times, ties / times, met)


def win_rate(table: Comparisons, policy: str, against: str) -> WinRate:
    """How often `policy` beats `against`, over the prompts that both answered.

    Raises:
        ValueError: they have no prompt in common.
    """
    for name in (policy, against):
        if name not in table.policies:
            raise ValueError(f"nobody ranked an answer of {name!r}; there are answers of {', '.join(table.policies)}")
    i, j = table.policies.index(policy), table.policies.index(against)
    both = table.met[:, i, j] > 0
    if not both.any():
        raise ValueError(f"{policy!r} and {against!r} have no prompt in common")
    scores, ties = table.wins[both, i, j], float(table.ties[both, i, j].mean())
    mean = float(scores.mean())
    return WinRate(int(both.sum()), mean, mean_ci95(scores.tolist()), mean - ties / 2, ties, 1 - mean - ties / 2)


def win_rate_by_scores(scores: Sequence[float], against: Sequence[float]) -> WinRate:
    """How often a policy's answer has a higher score than another policy's answer to the same prompt.

    Index i of both is the answer to prompt i. Raises `ValueError` if the counts differ.
    """
    rows = [
        Judgement(str(i), ("one", "other"), (1 + (own < other), 1 + (own > other)))
        for i, (own, other) in enumerate(zip(scores, against, strict=True))
    ]
    return win_rate(comparisons(rows), "one", "other")


def strengths(table: Comparisons, *, resamples: int = RESAMPLES, seed: int = 0) -> Strengths:
    """Bradley-Terry scores of the policies, with percentile intervals by bootstrap over prompts (Efron 1979).

    Raises:
        NoMaximum: as `bradley_terry` does.
    """
    flat = (table.wins * table.met).reshape(len(table.prompts), -1)
    n = len(table.policies)
    scores = bradley_terry(flat.sum(0).reshape(n, n))
    draw = np.random.default_rng(seed)
    drawn = draw.multinomial(len(table.prompts), np.full(len(table.prompts), 1 / len(table.prompts)), resamples) @ flat
    again: list[Array] = []
    for wins in drawn.reshape(resamples, n, n):
        try:
            again.append(bradley_terry(wins))
        except NoMaximum:
            continue
    if again:
        low, high = np.quantile(np.stack(again), [0.025, 0.975], axis=0)
    else:
        low, high = np.full(n, -np.inf), np.full(n, np.inf)
    order = np.argsort(-scores, kind="stable")
    found = tuple(Strength(table.policies[i], float(scores[i]), (float(low[i]), float(high[i]))) for i in order)
    return Strengths(found, resamples, resamples - len(again))


def bradley_terry(wins: Array) -> Array:
    """Maximum-likelihood scores s [n] from wins [n, n], `wins[i, j]` times i over j (Bradley and Terry 1952):

        P(i beats j) = sigmoid(s_i - s_j), sum_i s_i = 0

    A tie is half a win each way. Two policies have the closed form s_0 - s_1 = log(wins[0, 1] / wins[1, 0]). More are
    found by minorisation-maximisation (Hunter 2004, "MM algorithms for generalized Bradley-Terry models", eq. 3): with
    pi_i = exp(s_i), W_i the wins of i and N_ij the comparisons of i and j,

        pi_i <- W_i / sum_j N_ij / (pi_i + pi_j)

    Raises:
        NoMaximum: the policies fall into two groups of which one never lost to the other (Ford 1957), so no finite
            scores maximise the likelihood.
    """
    wins = np.array(wins, dtype=np.float64)
    n = len(wins)
    if wins.shape != (n, n) or n < 2 or (wins < 0).any():
        raise ValueError(
            f"wins of shape {wins.shape}: a square table of two policies or more is needed, nothing below 0"
        )
    np.fill_diagonal(wins, 0)
    if not _each_reaches_all(wins > 0):
        raise NoMaximum("one or more policies never lost to the others, never won or never met them: no finite score")
    if n == 2:
        half = float(np.log(wins[0, 1] / wins[1, 0])) / 2
        return np.array([half, -half])
    won, times = wins.sum(1), wins + wins.T
    strength = np.ones(n)
    for _ in range(MAX_ITERATIONS):
        new = won / (times / (strength[:, None] + strength[None, :])).sum(1)
        new /= np.exp(np.log(new).mean())
        moved = np.abs(np.log(new) - np.log(strength)).max()
        strength = new
        if moved < TOLERANCE:
            break
    scores: Array = np.log(strength)
    return scores


def _each_reaches_all(beats: NDArray[np.bool_]) -> bool:
    """Whether a chain of wins leads from every policy to every other one."""
    n = len(beats)
    reached = beats | np.eye(n, dtype=bool)
    for _ in range(n):
        reached = (reached.astype(int) @ reached.astype(int)) > 0
    return bool(reached.all())
