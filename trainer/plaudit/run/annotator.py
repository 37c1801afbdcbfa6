"""Simulated people: a hidden judge's scores in, a ranking out, and a working day over the ranking service's routes.

What a simulated person says about a task depends on the seed, the person and the task's texts alone: not on the order
in which the answers are shown, nor on who else is at work. Who gets which task is the service's decision.
"""

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, TypeAlias

from plaudit.run.rankings import RankingPerson
from plaudit.wire import rankings as wire

Turn: TypeAlias = Literal["done", "idle", "finished"]
Judge: TypeAlias = Callable[[str, Sequence[str]], list[float]]
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


class Annotator:
    """One simulated person at work, a task at a time."""

    def __init__(self, service: RankingPerson, judge: Judge, habits: Habits, *, person: str, limit: int | None) -> None:
        self.statuses: Counter[str] = Counter()
        """Submissions by what became of them."""
        self.idle_since: float | None = None
        """When they last began to find nothing but tasks that others hold."""
        self._service = service
        self._judge = judge
        self._habits = habits
        self._person = person
        self._limit = limit

    def turn(self) -> Turn:
        """Look for a task and say something about it."""
        if self._limit is not None and self.statuses.total() >= self._limit:
            return "finished"
        task = self._service.next_task()
        if isinstance(task, wire.NoTask):
            self.idle_since = time.monotonic() if self.idle_since is None else self.idle_since
            return "idle" if task.waiting else "finished"
        self.idle_since = None
        answers = {answer.id: answer.text for answer in task.answers}
        ranks = decide(as_text(task.prompt), answers, self._judge, self._habits, person=self._person)
        accepted = self._service.skip(task) if ranks is None else self._service.rank(task, ranks)
        self.statuses[accepted.status] += 1
        return "done"


def all_at_work(
    annotators: Sequence[Annotator],
    *,
    concurrency: int,
    patience_s: float,
    on_done: Callable[[], None] = lambda: None,
) -> int:
    """Everybody ranks until nothing is left for them; they take turns, `concurrency` of them at once.

    Tasks that others hold may come free: whoever finds nothing else for `patience_s` stops. How many did.
    """
    queue: SimpleQueue[Annotator | None] = SimpleQueue()
    for annotator in annotators:
        queue.put(annotator)
    left, stopped = len(annotators), 0
    lock = threading.Lock()

    def ends(*, idle: bool) -> None:
        nonlocal left, stopped
        with lock:
            left -= 1
            stopped += idle
            if left == 0:
                for _ in range(concurrency):
                    queue.put(None)

    def take_turns() -> None:
        while (annotator := queue.get()) is not None:
            turn = annotator.turn()
            if turn == "finished":
                ends(idle=False)
                continue
            if turn == "done":
                on_done()
            elif annotator.idle_since is not None and time.monotonic() - annotator.idle_since > patience_s:
                ends(idle=True)
                continue
            else:
                time.sleep(LOOK_AGAIN_S)
            queue.put(annotator)

    def guarded() -> None:
        try:
            take_turns()
        except BaseException:
            for _ in range(concurrency):
                queue.put(None)
            raise

    with ThreadPoolExecutor(concurrency, thread_name_prefix="annotator") as pool:
        futures = [pool.submit(guarded) for _ in range(concurrency)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            # Of a worker that goes on after another has failed, the queue must end too.
            for _ in range(concurrency):
                queue.put(None)
    return stopped


def as_text(prompt: str | Sequence[wire.Turn]) -> str:
    """A prompt as the judge gets it: a conversation becomes a line for each turn."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn.role}: {turn.content}\n" for turn in prompt)
