"""Simulated people: a hidden judge's scores in, a ranking out, and a working day over the ranking service's routes.

What a simulated person says about a task depends on the seed, the person and the task's texts alone: not on the order
in which the answers are shown, nor on who else is at work. Who gets which task is the service's decision.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plaudit.run.rankings import RankingPerson
from plaudit.wire import rankings as wire

Judge = Callable[[str, Sequence[str]], list[float]]
"""Scores of several answers to one prompt, higher is better. Called from several threads."""
LOOK_AGAIN_S = 0.25
"""How often somebody without a task looks whether one has come free."""


@dataclass(frozen=True)
class Habits:
    """How one simulated person judges."""

    temperature: float = 0.0
    """Scale of the Gumbel noise on the judge's scores."""
    tie_margin: float = 0.0
    carelessness: float = 0.0
    """Share of the tasks ranked at random."""
    skips: float = 0.0
    """Share of the tasks skipped."""


def ranking(scores: Sequence[float], habits: Habits, draw: random.Random) -> list[int]:
    """A rank for each score, 1 for the best.

    Each score gets Gumbel noise of scale `temperature`, and the order of the sums is a draw from the Plackett-Luce
    model with weights exp(score / temperature) (Luce 1959; Yellott 1977). Sums at most `tie_margin` below the first of
    their place share that place. A careless ranking is a random order.
    """
    if draw.random() < habits.carelessness:
        return draw.sample(range(1, len(scores) + 1), len(scores))
    felt = [score + habits.temperature * gumbel(draw) for score in scores]
    ranks = [0] * len(felt)
    place, first = 0, math.inf
    for i in sorted(range(len(felt)), key=lambda i: -felt[i]):
        if place == 0 or first - felt[i] > habits.tie_margin:
            place, first = place + 1, felt[i]
        ranks[i] = place
    return ranks


def gumbel(draw: random.Random) -> float:
    """A standard Gumbel number by inversion; `random` may give 0, whose logarithm isn't finite."""
    return -math.log(-math.log(max(draw.random(), 1e-300)))


def decide(
    prompt: str, answers: Mapping[str, str], judge: Judge, habits: Habits, *, person: str
) -> dict[str, int] | None:
    """What `person` says about answers, text by id: a rank by id, or None for a skip.

    Deterministic in its arguments; the order of `answers` makes no difference.
    """
    ids = sorted(answers, key=lambda identity: (answers[identity], identity))
    texts = [answers[identity] for identity in ids]
    draw = random.Random(wire.content_hash("annotator", person, prompt, texts))
    if draw.random() < habits.skips:
        return None
    return dict(zip(ids, ranking(judge(prompt, texts), habits, draw), strict=True))


def work(
    service: RankingPerson,
    judge: Judge,
    habits: Habits,
    *,
    person: str,
    limit: int | None,
    patience_s: float,
    on_done: Callable[[str], None] = lambda status: None,
) -> Counter[str]:
    """Rank until nothing is left, or `limit` tasks are done; how many submissions ended with which status.

    Tasks that others hold may come free: after `patience_s` of finding nothing else, the person stops, and "waiting" is
    counted once.
    """
    done: Counter[str] = Counter()
    idle_since: float | None = None
    while limit is None or done.total() < limit:
        task = service.next_task()
        if isinstance(task, wire.NoTask):
            idle_since = time.monotonic() if idle_since is None else idle_since
            if not task.waiting:
                break
            if time.monotonic() - idle_since > patience_s:
                done["waiting"] += 1
                break
            time.sleep(LOOK_AGAIN_S)
            continue
        idle_since = None
        answers = {answer.id: answer.text for answer in task.answers}
        ranks = decide(as_text(task.prompt), answers, judge, habits, person=person)
        accepted = service.skip(task) if ranks is None else service.rank(task, ranks)
        done[accepted.status] += 1
        on_done(accepted.status)
    return done


def as_text(prompt: str | Sequence[wire.Turn]) -> str:
    """A prompt as the judge gets it: a conversation becomes a line for each turn."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn.role}: {turn.content}\n" for turn in prompt)
