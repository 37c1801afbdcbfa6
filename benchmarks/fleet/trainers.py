"""Many trainers as clients in one event loop: each sends a burst of chunks, works, waits for its rewards, is silent.

Each trainer has a key and connections of its own and uses the reward client's own code (`plaudit.rewards.source`), so
retries, hedging, limits and checks are the real ones. Generation and updates are sleeps of a recorded run's lengths.

Failure modes: a load that slows down with its server and so never shows an overload; steps that are counted at the end
of the measurement only when they were short.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.fleet.testbed import LABEL
from plaudit.rewards.endpoint import Endpoint
from plaudit.rewards.errors import RewardError
from plaudit.rewards.rows import Row, rows_of
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.rewards.source import Source
from plaudit.sizing.workload import TOKENS_AROUND, Draws, Workload

WORDS = "the movie was good bad great story and but not it this best of to in".split()  # noqa: SIM905
"""Each is one token of the embedded judge."""


@dataclass
class Seen:
    """What all trainers saw between `begin` and `end`, on the clock of `time.monotonic()`."""

    begin: float
    end: float
    waits: list[tuple[int, float, float]] = field(default_factory=list)
    """Trainer, begin and end of each wait for rewards."""
    answers: list[tuple[int, float, float, int]] = field(default_factory=list)
    """Trainer, when sent, when answered, texts; retries included."""
    steps: list[tuple[int, float, float, float]] = field(default_factory=list)
    """Trainer, begin, end, seconds waited."""
    statuses: Counter[str] = field(default_factory=Counter)
    """HTTP answers by status, and failures of connections by name, attempt by attempt."""
    revisions: dict[int, set[str]] = field(default_factory=dict)
    """The revisions of the reward model that each trainer got rewards of."""
    stopped: dict[int, str] = field(default_factory=dict)
    """Trainers that ended with an error, and what it said."""

    def figures(self, trainers: int) -> dict[str, float]:
        """Rates and shares over the time of the measurement. A wait counts with the part that lies in it."""
        seconds = self.end - self.begin
        waited = sum(max(0.0, min(end, self.end) - max(begin, self.begin)) for _, begin, end in self.waits)
        answered = [answer for answer in self.answers if self.begin <= answer[2] < self.end]
        latencies = sorted(done - sent for _, sent, done, _ in answered)
        texts: Counter[int] = Counter()
        for trainer, _, _, count in answered:
            texts[trainer] += count
        shares = [texts[trainer] for trainer in range(trainers) if trainer not in self.stopped]
        steps = [step for step in self.steps if self.begin <= step[2] < self.end]
        return {
            "texts_per_s": sum(texts.values()) / seconds,
            "requests_per_s": len(answered) / seconds,
            "wait_share": waited / seconds / trainers,
            "wait_s": sum(step[3] for step in steps) / max(1, len(steps)),
            "steps": len(steps),
            "latency_mean_s": sum(latencies) / max(1, len(latencies)),
            "latency_p50_s": quantile(latencies, 0.5),
            "latency_p99_s": quantile(latencies, 0.99),
            "share_largest": max(shares, default=0) / (sum(shares) / len(shares)) if sum(shares) else 0.0,
            "share_smallest": min(shares, default=0) / (sum(shares) / len(shares)) if sum(shares) else 0.0,
            "refused": self.statuses["429"] + self.statuses["503"],
        }


def quantile(ranked: Sequence[float], share: float) -> float:
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


class Counting(httpx.AsyncHTTPTransport):
    """Counts what every attempt came to, those included that the client repeats."""

    def __init__(self, statuses: Counter[str], limits: httpx.Limits) -> None:
        super().__init__(limits=limits)
        self._statuses = statuses

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            response = await super().handle_async_request(request)
        except httpx.TransportError as error:
            self._statuses[type(error).__name__] += 1
            raise
        self._statuses[str(response.status_code)] += 1
        return response


class Trainer:
    """One trainer: its own key, connections, random numbers and clock."""

    def __init__(
        self,
        number: int,
        urls: Sequence[str],
        key: str,
        workload: Workload,
        seen: Seen,
        *,
        hedge_after_s: float | None = None,
        patience_s: float = 600.0,
        allow_revision_change: bool = False,
    ) -> None:
        self.number = number
        self._workload = workload
        self._seen = seen
        self._draws = Draws(workload, number)
        component = RewardComponent(url=tuple(urls), label=LABEL, kind="plaudit")
        settings = RewardSettings(
            (component,),
            patience_s=patience_s,
            chunk_size=workload.request_texts,
            max_in_flight=workload.in_flight,
            hedge_after_s=hedge_after_s,
            check_order=False,
            allow_revision_change=allow_revision_change,
        )
        limits = httpx.Limits(
            max_connections=2 * workload.in_flight * len(urls), max_keepalive_connections=workload.in_flight * len(urls)
        )
        self._http = httpx.AsyncClient(
            transport=Counting(seen.statuses, limits),
            headers={"Accept": "application/json", "Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s),
            trust_env=False,
        )
        endpoints = [
            Endpoint(url, component, self._http, settings.request_timeout_s, settings.max_in_flight) for url in urls
        ]
        self.source = Source(component, settings, endpoints, None)
        self._rows = self._some_rows()

    def _some_rows(self) -> list[Row]:
        """The texts of each of its steps, of as many tokens as drawn."""
        words = random.Random(self.number)
        texts = [words.choices(WORDS, k=tokens - TOKENS_AROUND) for tokens in self._draws.tokens]
        return rows_of([text[0] for text in texts], [" " + " ".join(text[1:]) for text in texts], {})

    async def run(self, over: asyncio.Event) -> None:
        """Steps until it is over, the first one from a random place in it. An error of the client ends it."""
        try:
            await self._pause(self._draws.first_pause_s, over)
            while not over.is_set():
                await self._step(over)
        except* RewardError as group:
            first_error = group.exceptions[0]
            self._seen.stopped[self.number] = f"{type(first_error).__name__}: {first_error}"
        finally:
            await self._http.aclose()

    async def _pause(self, seconds: float, over: asyncio.Event) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await over.wait()

    async def _step(self, over: asyncio.Event) -> None:
        workload, began = self._workload, time.monotonic()
        pending: list[asyncio.Task[None]] = []
        row = 0
        async with asyncio.TaskGroup() as group:
            for chunk in workload.chunks:
                await self._pause(self._draws.jittered(workload.generate_s), over)
                if over.is_set():
                    return
                for texts in chunk:
                    pending.append(group.create_task(self._ask(self._rows[row : row + texts])))
                    row += texts
                await self._pause(self._draws.jittered(workload.evaluate_s), over)
            waiting = time.monotonic()
            await asyncio.gather(*pending)
        done = time.monotonic()
        self._seen.waits.append((self.number, waiting, done))
        await self._pause(self._draws.jittered(workload.update_s), over)
        self._seen.steps.append((self.number, began, time.monotonic(), done - waiting))

    async def _ask(self, rows: Sequence[Row]) -> None:
        sent = time.monotonic()
        answer = await self.source.score(rows)
        self._seen.answers.append((self.number, sent, time.monotonic(), len(rows)))
        self._seen.revisions.setdefault(self.number, set()).add(answer.revision)


async def run_trainers(
    urls: Sequence[str],
    keys: Sequence[str],
    workload: Workload,
    *,
    warm_up_s: float,
    seconds: float,
    during: Callable[[Seen], "asyncio.Future[None] | None"] = lambda seen: None,
    hedge_after_s: float | None = None,
    patience_s: float = 600.0,
    allow_revision_change: bool = False,
) -> Seen:
    """A trainer for each key, for `warm_up_s` and then `seconds` of measurement, beside whatever `during` starts."""
    seen = Seen(0.0, float("inf"))
    trainers = [
        Trainer(
            number,
            urls,
            key,
            workload,
            seen,
            hedge_after_s=hedge_after_s,
            patience_s=patience_s,
            allow_revision_change=allow_revision_change,
        )
        for number, key in enumerate(keys)
    ]
    for begun in range(0, len(trainers), 50):
        await asyncio.gather(*(trainer.source.connect() for trainer in trainers[begun : begun + 50]))
    over = asyncio.Event()
    running = [asyncio.create_task(trainer.run(over)) for trainer in trainers]
    await asyncio.sleep(warm_up_s)
    seen.begin = time.monotonic()
    seen.statuses.clear()
    beside = during(seen)
    await asyncio.sleep(seconds)
    seen.end = time.monotonic()
    counted = Counter(seen.statuses)
    if beside is not None:
        await beside
    over.set()
    await asyncio.gather(*running)
    seen.statuses = counted
    return seen
