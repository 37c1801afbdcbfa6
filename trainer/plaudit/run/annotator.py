"""Simulated annotators: they rank answers by the scores of a judge, through the ranking service's HTTP routes.

A simulated ranking depends only on the seed, the annotator and the task's texts, not on the order of the answers or on
other annotators. The service assigns the tasks.
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
"""Scores several answers to one prompt; higher is better. Called from several threads."""
LOOK_AGAIN_S = 0.25
"""How often an annotator without a task asks for one."""


@dataclass(frozen=True)
class Habits:
    """How one simulated annotator ranks."""

    temperature: float = 0.0
    """Scale of the Gumbel noise on the judge's scores."""
    tie_margin: float = 0.0
    carelessness: float = 0.0
    """Share of the tasks ranked at random."""
    skips: float = 0.0
    """Share of the tasks skipped."""


def ranking(scores: Sequence[float], habits: Habits, draw: random.Random) -> list[int]:
    """A rank for each score, 1 for the best.

    Each score gets Gumbel noise of scale `temperature`. The order of the sums is a sample from the Plackett-Luce model
    with weights exp(score / temperature) (Luce 1959; Yellott 1977). Sums at most `tie_margin` below the first one of a
    rank share that rank. A careless ranking is a random order.
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
    """A standard Gumbel sample by inversion. `random` may return 0, whose logarithm isn't finite."""
    return -math.log(-math.log(max(draw.random(), 1e-300)))


def decide(
    prompt: str, answers: Mapping[str, str], judge: Judge, habits: Habits, *, person: str
) -> dict[str, int] | None:
    """The ranking of `answers` (texts by id) by `person`: ranks by id, or None for a skip.

    Deterministic, and independent of the order of `answers`.
    """
    ids = sorted(answers, key=lambda identity: (answers[identity], identity))
    texts = [answers[identity] for identity in ids]
    draw = random.Random(wire.content_hash("annotator", person, prompt, texts))
    if draw.random() < habits.skips:
        return None
    return dict(zip(ids, ranking(judge(prompt, texts), habits, draw), strict=True))


class Annotator:
    """One simulated annotator, who does one task at a time."""

    def __init__(self, service: RankingPerson, judge: Judge, habits: Habits, *, person: str, limit: int | None) -> None:
        self.statuses: Counter[str] = Counter()
        """Number of submissions by status."""
        self.idle_since: float | None = None
        """Since when all remaining tasks have been leased to others; None while there is a task."""
        self._service = service
        self._judge = judge
        self._habits = habits
        self._person = person
        self._limit = limit

    def turn(self) -> Turn:
        """Fetch one task and rank or skip it."""
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
    """Run all annotators until no tasks are left for them. They take turns, `concurrency` of them in parallel.

    Tasks leased to others may become free again. An annotator who finds no other task for `patience_s` stops. Returns
    the number of annotators who stopped this way.
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
            # Also end the workers that continue after another one has failed.
            for _ in range(concurrency):
                queue.put(None)
    return stopped


def as_text(prompt: str | Sequence[wire.Turn]) -> str:
    """A prompt as text for the judge: a conversation becomes one line per turn."""
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{turn.role}: {turn.content}\n" for turn in prompt)
