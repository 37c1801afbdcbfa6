"""One reward from one or several endpoints: load balancing, circuit breaking, retries and hedging.

A chunk goes to the endpoint with the least outstanding work. A failing endpoint is avoided for a growing time, then
probed with one request at a time. Its chunk moves to a healthy endpoint at once; if there is none, it waits with
exponential backoff and jitter, at least as long as `Retry-After` asks. `patience_s` counts from the last usable answer,
so it limits outages, not long queues. With `hedge_after_s`, a slow chunk is also sent to a second healthy endpoint, one
chunk at a time, and the first answer is used. Scoring a text twice is harmless.

A 500 is retried, because servers return bursts of them when they restart or run out of memory. A chunk that gets 500
`MAX_SERVER_ERRORS` times while other chunks get their rewards is rejected, because it is likely the cause.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from typing import TypeVar

import stamina

from plaudit.rewards.endpoint import Endpoint, Trouble
from plaudit.rewards.errors import Exchange, NoScore, RewardRejected, RewardUnavailable, shown
from plaudit.rewards.rows import Row, check_names, rows_of
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.wire import MAX_VALUES_PER_REQUEST, ModelInfo, RewardResponse

log = logging.getLogger(__name__)
Result = TypeVar("Result")

MAX_SERVER_ERRORS = 5
VALUES_BESIDE = 16
"""JSON values of a request besides its items."""
WAIT_INITIAL_S = 0.1
WAIT_MAX_S = 5.0
WAIT_JITTER_S = 0.5
ASIDE_MAX_S = 30.0
ORDER_PROBES = [
    ("The film", " was all right, I suppose, though it could have ended half an hour earlier."),
    ("I", " loved it."),
    ("This is", " a terrible, boring waste of everyone's time."),
    ("I", " hated it."),
]
OPPOSITES = (1, 3)
"""Indices of two probes with the same length and opposite meaning."""


class Source:
    """One reward and its endpoints. All methods run on one event loop."""

    def __init__(
        self,
        component: RewardComponent,
        settings: RewardSettings,
        endpoints: Sequence[Endpoint],
        on_wait: Callable[[str], None] | None,
        *,
        fields: Collection[str] | None = None,
    ) -> None:
        """`fields`: names of the rows' columns, if known."""
        self.revision: str | None = None
        self._fields = fields
        self._component = component
        self._settings = settings
        self._endpoints = list(endpoints)
        self._on_wait = on_wait or (lambda message: None)
        self._waiting = False
        self._answered_at = float("-inf")
        self._in_flight = asyncio.Semaphore(settings.max_in_flight * len(self._endpoints))
        self._retries_in_flight = asyncio.Semaphore(len(self._endpoints))
        self._hedging = asyncio.Lock()

    async def connect(self) -> ModelInfo:
        """Wait until an endpoint is ready. Raises `RewardUnavailable`, or `RewardRejected` if one can't be used."""

        async def attempt() -> ModelInfo:
            asked = [endpoint for endpoint in self._endpoints if endpoint.info is None]
            answers = await asyncio.gather(*(self._describe(endpoint) for endpoint in asked), return_exceptions=True)
            infos = [answer for answer in answers if isinstance(answer, ModelInfo)]
            failures = [answer for answer in answers if isinstance(answer, BaseException)]
            for failure in failures:
                if not isinstance(failure, Trouble):
                    raise failure
            if not infos:
                raise failures[0]
            return infos[0]

        return await self._patiently(attempt)

    async def score(self, rows: Sequence[Row]) -> RewardResponse:
        """The rewards of one chunk. Raises `RewardUnavailable` or `RewardRejected`."""
        async with self._in_flight:
            return await self._until_scored(lambda: self._patiently(lambda: self._attempt(rows)))

    def chunks(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """The rows in chunks that every endpoint accepts in one request."""
        sizes = [endpoint.info.limits.max_items for endpoint in self._endpoints if endpoint.info is not None]
        if not all(isinstance(row.item.prompt, str) for row in rows):
            sizes += [e.conversations_per_request for e in self._endpoints if e.conversations_per_request is not None]
        size = min([self._settings.chunk_size, *sizes])
        names = {name for endpoint in self._endpoints for name in (*endpoint.needs, *endpoint.takes)}
        pieces: list[list[Row]] = [[]]
        values = VALUES_BESIDE
        for row in rows:
            more = row.values(names)
            if pieces[-1] and (len(pieces[-1]) == size or values + more > MAX_VALUES_PER_REQUEST):
                pieces.append([])
                values = VALUES_BESIDE
            pieces[-1].append(row)
            values += more
        return [piece for piece in pieces if piece]

    async def _describe(self, endpoint: Endpoint) -> ModelInfo:
        with self._watching(endpoint):
            info = await endpoint.describe()
            try:
                self._check_label(endpoint.url, info)
                self._check_revision(endpoint.url, info.revision)
                check_names(endpoint.needs, self._fields, endpoint.url)
                # Probes have no fields, and an endpoint that takes one text per request can't mix up the order.
                if self._settings.check_order and not endpoint.needs and info.limits.max_items > 1:
                    await _check_order(endpoint)
                if self._component.kind == "chat-judge":
                    await self._probe(endpoint)
            except BaseException:
                endpoint.info = None
                raise
            return info

    async def _probe(self, endpoint: Endpoint) -> None:
        """Ask a judge a test question, to check that the server supports the requested format. Raises like `score`."""
        prompt, response = ORDER_PROBES[0]
        probe = rows_of([prompt], [response], {name: ["none"] for name in endpoint.needs})
        await self._until_scored(lambda: endpoint.score(probe))

    async def _until_scored(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Retry while a judge's answer has no score. Raises `RewardRejected` after `judge.tries` requests."""
        tries = 0
        while True:
            tries += 1
            try:
                return await work()
            except NoScore as error:
                if tries == self._component.judge.tries:
                    said = f"{error} (asked {tries} times, reward.judge.tries)"
                    raise RewardRejected(said, error.exchange) from error

    async def _attempt(self, rows: Sequence[Row]) -> RewardResponse:
        first = self._choose()
        if self._settings.hedge_after_s is None or len(self._endpoints) == 1:
            return await self._ask(first, rows)
        asked = {asyncio.create_task(self._ask(first, rows))}
        try:
            await asyncio.wait(asked, timeout=self._settings.hedge_after_s)
            others = [e for e in self._endpoints if e is not first and e.failures == 0]
            if any(task.done() for task in asked) or not others or self._hedging.locked():
                return await next(iter(asked))
            async with self._hedging:
                asked.add(asyncio.create_task(self._ask(min(others, key=lambda e: e.outstanding), rows)))
                done, late = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                if late and isinstance(next(iter(done)).exception(), Trouble):
                    done, _ = await asyncio.wait(late)
                return next(iter(done)).result()
        finally:
            for task in asked:
                task.cancel()

    async def _ask(self, endpoint: Endpoint, rows: Sequence[Row]) -> RewardResponse:
        if endpoint.info is None:
            await self._describe(endpoint)
        with self._watching(endpoint):
            async with endpoint.places:
                answer, exchange = await endpoint.score(rows)
        self._check_revision(endpoint.url, answer.revision, exchange)
        self._answered_at = asyncio.get_running_loop().time()
        return answer

    def _choose(self) -> Endpoint:
        """The endpoint with the least outstanding work that is not avoided; a failing one gets one request at a
        time."""
        now = asyncio.get_running_loop().time()
        fit = [e for e in self._endpoints if e.aside_until <= now and not (e.failures and e.outstanding)]
        return min(fit or self._endpoints, key=lambda endpoint: (endpoint.outstanding, endpoint.aside_until))

    @contextlib.contextmanager
    def _watching(self, endpoint: Endpoint) -> Iterator[None]:
        endpoint.outstanding += 1
        try:
            yield
        except Trouble as trouble:
            endpoint.failures += 1
            asked_s = min(trouble.retry_after_s or 0.0, self._settings.patience_s)
            pause_s = max(pause_after(endpoint.failures), asked_s)
            endpoint.aside_until = asyncio.get_running_loop().time() + pause_s
            raise
        else:
            endpoint.failures = 0
            endpoint.aside_until = 0.0
        finally:
            endpoint.outstanding -= 1

    async def _patiently(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Retry `work` until it succeeds, is rejected, or there was no usable answer for `patience_s`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        server_errors: list[float] = []
        last_trouble: Trouble | None = None

        def deadline() -> float:
            return max(started, self._answered_at) + self._settings.patience_s

        def is_itself_the_reason() -> bool:
            return len(server_errors) >= MAX_SERVER_ERRORS and self._answered_at > server_errors[0]

        def wait_before_retrying(error: Exception) -> bool | float:
            nonlocal last_trouble
            if not isinstance(error, Trouble):
                return False
            last_trouble = error
            now = loop.time()
            left_s = deadline() - now
            if error.server_error:
                server_errors.append(now)
            if left_s <= 0 or is_itself_the_reason():
                return False
            if any(endpoint.failures == 0 for endpoint in self._endpoints):
                return 0.0
            self._waiting = True
            self._on_wait(f"waiting for a reward, for {left_s:.0f} s more: {error}")
            if error.retry_after_s is None:
                return True
            return min(error.retry_after_s + random.uniform(0, WAIT_JITTER_S), left_s)

        try:
            async for attempt in stamina.retry_context(
                on=wait_before_retrying,
                attempts=None,
                timeout=None,
                wait_initial=WAIT_INITIAL_S,
                wait_max=WAIT_MAX_S,
                wait_jitter=WAIT_JITTER_S,
            ):
                with attempt:
                    if last_trouble is None:
                        result = await work()
                    else:
                        async with self._turn_to_retry(deadline(), last_trouble):
                            result = await work()
        except Trouble as error:
            if is_itself_the_reason():
                raise RewardRejected(
                    f"{len(server_errors)} times the server failed on this request while it answered others: {error}",
                    error.exchange,
                ) from error
            raise RewardUnavailable(
                f"no usable answer for {loop.time() - max(started, self._answered_at):.0f} s "
                f"(reward.patience_s={self._settings.patience_s:g}); the last failure was {error}. "
                "Start a reward service with `plaudit-reward`, or name one that runs with --reward.url."
            ) from error
        if self._waiting:
            self._waiting = False
            self._on_wait("")
        return result

    @contextlib.asynccontextmanager
    async def _turn_to_retry(self, deadline: float, last_trouble: Trouble) -> AsyncIterator[None]:
        """The retry budget: one retry at a time per endpoint, which prevents retry storms."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._retries_in_flight.acquire()
        except TimeoutError:
            raise last_trouble from None
        try:
            yield
        finally:
            self._retries_in_flight.release()

    def _check_label(self, url: str, info: ModelInfo) -> None:
        label = self._component.label
        there_are = ", ".join(info.labels)
        if not info.labels:
            return
        if label is None and info.default_label is None and len(info.labels) > 1:
            raise RewardRejected(
                f"{url} serves {info.id} with several labels: choose one with --reward.label: {there_are}"
            )
        if label is not None and label not in info.labels:
            raise RewardRejected(
                f"{url} serves {info.id}, which has no label {label!r}: choose one with --reward.label: {there_are}"
            )

    def _check_revision(self, url: str, revision: str, exchange: Exchange | None = None) -> None:
        if self.revision is not None and revision != self.revision:
            if not self._settings.allow_revision_change:
                raise RewardRejected(
                    f"{url} answers with reward model revision {revision}, and so far it was {self.revision}: rewards "
                    "of two models don't compare. Serve the first one again, or give --reward.allow-revision-change.",
                    exchange,
                )
            log.warning(
                "%s answers with reward model revision %s, so far it was %s", url, shown(revision), self.revision
            )
        self.revision = revision


def pause_after(failures: int) -> float:
    """Seconds for which an endpoint is avoided after this many consecutive failures: 0.2, 0.4, ... 30."""
    return min(ASIDE_MAX_S, WAIT_INITIAL_S * 2.0 ** min(failures, 20))


async def _check_order(endpoint: Endpoint) -> None:
    """Raises `RewardRejected` if the endpoint returns rewards in another order than the texts.

    Scores may depend slightly on their batch, so rewards are compared with a tolerance of a tenth of their range. A
    judge with random answers passes. If two opposite texts get the same reward, there is only a warning, because a
    rule-based reward may not distinguish them.
    """
    probes = rows_of([prompt for prompt, _ in ORDER_PROBES], [response for _, response in ORDER_PROBES], {})
    together, exchange = await endpoint.score(probes)
    alone = [(await endpoint.score([probe]))[0].rewards[0] for probe in probes]
    tolerance = (max(alone) - min(alone)) / 10
    one, other = (ORDER_PROBES[place] for place in OPPOSITES)
    if len({alone[place] for place in OPPOSITES}) == 1:
        log.warning(
            "%s gives %r and %r the same reward, %s: if all texts of one length get the same, nothing can be learned "
            "from it; look at its model and at its tokenizer's files",
            endpoint.url,
            "".join(one),
            "".join(other),
            _rounded(alone[1:2]),
        )

    def alike(left: Sequence[float], right: Sequence[float]) -> bool:
        return all(abs(a - b) <= tolerance for a, b in zip(left, right, strict=True))

    if alike(sorted(together.rewards), sorted(alone)) and not alike(together.rewards, alone):
        raise RewardRejected(
            f"{endpoint.url} gives rewards in another order than the texts: {_rounded(together.rewards)} together and "
            f"{_rounded(alone)} one by one",
            exchange,
        )


def _rounded(rewards: Sequence[float]) -> str:
    return ", ".join(f"{reward:.3g}" for reward in rewards)
