"""What the handlers of all protocols share: scoring, limits, labels, reload, and the state of a drain.

Failure modes: a score computed after its client has disconnected; two protocols with different limits.
"""

import asyncio
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from plaudit import wire
from plaudit.reward_service.engine.batching import Chat, Engine, Job, Plain, Scored, Scorer, Text
from plaudit.reward_service.engine.cache import CachedScore, ScoreCache
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.http import garbage_collection, tracing
from plaudit.reward_service.http.memory_budget import MemoryBudget
from plaudit.reward_service.problems import ProblemError, draining

RESERVATION = "plaudit.reservation"
"""In a request's scope: its memory reservation, which `AccessMiddleware` releases when the answer is written."""
CALLER = "plaudit.caller"
"""In a request's scope: the caller, as the key of the engine's fair queueing."""
TIMEOUT_HEADER = "x-request-timeout"
WATCH_AFTER_S = 0.02
"""How long to wait before watching for a disconnect, which costs a task. Most requests are answered sooner."""


@dataclass(frozen=True)
class ServiceLimits:
    """Limits on one request. `GET /v1/model` reports them."""

    max_items: int = wire.MAX_ITEMS_PER_REQUEST
    max_text_chars: int = wire.MAX_TEXT_CHARS
    max_body_bytes: int = 16 * 1024 * 1024
    max_held_bytes: int = 128 * 1024 * 1024
    """The memory budget for the bodies of all requests together."""


@dataclass(frozen=True)
class Service:
    """The state that all handlers share, and scoring on top of the engine."""

    engine: Engine
    limits: ServiceLimits
    default_label: str | None
    join: wire.Join
    cache: ScoreCache | None = None
    reload: Callable[[], Scorer] | None = None
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    in_flight: set[Job] = field(default_factory=set)
    """Jobs that the engine has admitted and that aren't answered: a drain waits for them."""
    unadmitted: "set[asyncio.Task[Any]]" = field(default_factory=set)
    """Handlers of requests that aren't admitted yet: a drain ends them with 503."""
    refusing: asyncio.Event = field(default_factory=asyncio.Event)
    memory: MemoryBudget = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", MemoryBudget(self.limits.max_held_bytes))

    async def score_items(
        self, items: Sequence[wire.RewardItem], label: str | None, request: Request
    ) -> tuple[Scored, int]:
        """The scores of these items, and the index of the logit that is the reward. Raises as `score` does."""
        index = self.label_index(self.engine.scorer, label)
        return await self.score(self._texts(items), request), index

    def _texts(self, items: Sequence[wire.RewardItem]) -> list[Text]:
        """Prompts and responses, joined as `--join` says. Raises `ProblemError` for messages without --join chat."""
        if self.join == "chat":
            return [conversation(item.prompt, item.response) for item in items]
        texts: list[Text] = []
        for index, item in enumerate(items):
            if not isinstance(item.prompt, str):
                raise ProblemError(
                    "strings-only",
                    f"items[{index}].prompt is a list of messages: this service was started with --join {self.join} "
                    "and takes strings; start it with --join chat",
                    item=index,
                )
            texts.append((item.prompt, item.response) if self.join == "pair" else (item.prompt + item.response, None))
        return texts

    def require_conversations(self) -> None:
        """Raises `ProblemError` for messages in another protocol, unless the service was started with --join chat."""
        if self.join != "chat":
            raise ProblemError(
                "strings-only",
                f"messages: this service was started with --join {self.join} and takes strings; start it with --join "
                "chat",
            )

    def refused_by_drain(self) -> "_Unadmitted":
        """A context for waits before admission: `refuse_unadmitted` ends them with 503."""
        return _Unadmitted(self)

    def record_refusal(self, request: Request, problem: ProblemError) -> None:
        """Count a request of any protocol that is refused with `problem`, and note it in its trace."""
        tracing.note_problem(request.scope, problem)
        self.engine.metrics.refused_requests.labels(problem.name).inc()

    def refuse_unadmitted(self) -> None:
        """Answer every request that isn't admitted with 503, now and from now on."""
        self.refusing.set()
        for task in list(self.unadmitted):
            task.cancel()

    async def score(self, texts: Sequence[Text], request: Request) -> Scored:
        """The logits of `texts`. Cancelled when the client disconnects or its deadline passes.

        Raises:
            ProblemError: the request isn't admitted, a text can't be scored, or the deadline passed.
            ClientGoneError: the client disconnected.
        """
        if self.cache is None:
            return await self._run(texts, request)
        known = self.cache.lookup(self.engine.scorer, texts)
        places = [place for place, score in enumerate(known) if score is None]
        missing = [texts[place] for place in places]
        self.engine.metrics.cached_items.inc(len(texts) - len(missing))
        if not missing:
            self.engine.require_open()
            return _merged(known, Scored([], [], [], self.engine.scorer, 0.0, 0.0, 0.0))
        scored = await self._run(missing, request, places)
        self.cache.keep(missing, scored)
        return _merged(known, scored)

    async def _run(self, texts: Sequence[Text], request: Request, places: Sequence[int] | None = None) -> Scored:
        timeout_s = timeout_of(request)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        caller = request.scope.get(CALLER, "")
        job = self.engine.submit(texts, deadline=deadline, caller=caller, places=places)
        self.in_flight.add(job)
        # The future itself is awaited, so that an answer costs one turn of the event loop. A disconnect, or the
        # deadline, cancels it.
        client = _DisconnectWatch(request, job.future.cancel)
        watch = job.loop.call_later(WATCH_AFTER_S, client.watch)
        timer = None if timeout_s is None else job.loop.call_later(timeout_s, job.future.cancel)
        try:
            return await job.future
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            if task.cancelling():
                raise
            if client.gone:
                raise ClientGoneError from None
            detail = f"no score within the {timeout_s:g} s of {TIMEOUT_HEADER}"
            raise ProblemError("deadline-exceeded", detail) from None
        finally:
            if timer is not None:
                timer.cancel()
            watch.cancel()
            client.forget()
            tracing.note_job(request.scope, job)
            self.engine.abandon(job)
            self.in_flight.discard(job)
            # Break the reference cycle: a failure's traceback holds this frame, and these variables hold the failure.
            del job, client, watch, timer

    def check_limits(self, texts: Sequence[Plain]) -> None:
        """Apply the same limits to texts that came by a foreign protocol. Raises `ProblemError`."""
        if not texts:
            raise ProblemError("empty-items", "the request holds no text")
        if len(texts) > self.limits.max_items:
            raise too_many(len(texts), self.limits)
        for index, (first, second) in enumerate(texts):
            if max(len(first), len(second or "")) > self.limits.max_text_chars:
                raise too_long(index, self.limits)
            if first.isascii() and (second is None or second.isascii()):
                continue
            try:
                first.encode()
                (second or "").encode()
            except UnicodeEncodeError:
                raise ProblemError("invalid-request", f"text {index} holds half a surrogate pair", item=index) from None

    async def reload_model(self) -> Scorer:
        """Load the model again and switch to it. On `ProblemError` the old model stays in use."""
        if self.reload is None:
            raise ProblemError("not-found", "this service can't reload its model; restart it")
        self.engine.require_open()
        with self.refused_by_drain():
            async with self.reloading:
                try:
                    scorer = await _in_thread(self.reload)
                    self.engine.replace(scorer)
                    garbage_collection.unfreeze()
                    asyncio.get_running_loop().call_later(garbage_collection.FREEZE_AFTER_S, garbage_collection.freeze)
                except (ModelError, ValueError) as error:
                    raise ProblemError("reload-failed", f"the old model still serves: {error}") from error
                return scorer

    def model_info(self, request_id: str | None = None) -> wire.ModelInfo:
        """The answer to `GET /v1/model`."""
        scorer = self.engine.scorer
        return wire.ModelInfo(
            id=scorer.id,
            revision=scorer.revision,
            labels=list(scorer.labels),
            default_label=self.default_label or (scorer.labels[0] if len(scorer.labels) == 1 else None),
            join=self.join,
            dtype=scorer.dtype,
            wire=wire.WIRE_VERSION,
            limits=wire.Limits(
                max_items=self.limits.max_items,
                max_text_chars=self.limits.max_text_chars,
                max_body_bytes=self.limits.max_body_bytes,
                max_tokens=scorer.max_tokens,
            ),
            request_id=request_id,
        )

    def label_index(self, scorer: Scorer, label: str | None) -> int:
        """The index of the logit that is the reward. A label is needed unless the model has a single logit."""
        wanted = label if label is not None else self.default_label
        if wanted is None:
            if len(scorer.labels) == 1:
                return 0
            raise ProblemError(
                "label-required",
                f"the model has {len(scorer.labels)} labels and the service has no default; name one in `label`",
                labels=list(scorer.labels),
            )
        if wanted not in scorer.labels:
            raise ProblemError(
                "unknown-label",
                f"the model has no label {wanted!r}; it has {', '.join(scorer.labels)}",
                labels=list(scorer.labels),
            )
        return scorer.labels.index(wanted)


def conversation(prompt: str | list[wire.ChatMessage], response: str) -> Chat:
    """The prompt's turns, of which a plain text is the user's, and the response as the assistant's."""
    turns = [("user", prompt)] if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]
    return Chat((*turns, ("assistant", response)))


async def _in_thread(load: Callable[[], Scorer]) -> Scorer:
    """`load()` in a daemon thread: the end of the process would wait for a thread of `asyncio`."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Scorer] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        if not loaded.done():
            set_outcome()

    def run() -> None:
        try:
            outcome = functools.partial(loaded.set_result, load())
        except Exception as error:
            outcome = functools.partial(loaded.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, daemon=True, name="reload").start()
    return await loaded


class _DisconnectWatch:
    """Watches a client that waits for its answer; `left` is called when it disconnects."""

    def __init__(self, request: Request, left: Callable[[], object]) -> None:
        self._request, self._left = request, left
        self._receiving: asyncio.Future[Any] | None = None

    def watch(self) -> None:
        self._receiving = asyncio.ensure_future(self._request.receive())
        self._receiving.add_done_callback(lambda _: self._left())

    @property
    def gone(self) -> bool:
        return self._receiving is not None and self._receiving.done()

    def forget(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()


class _Unadmitted:
    def __init__(self, service: Service) -> None:
        self._service = service

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._service.refusing.is_set():
            raise draining()
        self._task = task
        self._service.unadmitted.add(task)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._service.unadmitted.discard(self._task)
        if kind is asyncio.CancelledError and self._service.engine.draining:
            self._task.uncancel()
            raise draining() from None


class ClientGoneError(Exception):
    """The client disconnected before its request was answered."""


def too_many(count: int, limits: ServiceLimits) -> ProblemError:
    """The refusal of a request with too many items."""
    return ProblemError("too-many-items", f"the request holds {count} items; at most {limits.max_items} are taken")


def too_long(index: int, limits: ServiceLimits) -> ProblemError:
    """The refusal of an item with a text that is too long."""
    return ProblemError(
        "text-too-long", f"items[{index}] has a text of more than {limits.max_text_chars} characters", item=index
    )


def _merged(known: Sequence[CachedScore | None], scored: Scored) -> Scored:
    """`scored` with the cached scores inserted at their positions."""
    truncated = set(scored.truncated)
    fresh = (
        CachedScore(row, index in truncated, length)
        for index, (row, length) in enumerate(zip(scored.logits, scored.lengths, strict=True))
    )
    scores = [score or next(fresh) for score in known]
    return dataclasses.replace(
        scored,
        logits=[score.logits for score in scores],
        truncated=[index for index, score in enumerate(scores) if score.truncated],
        lengths=[score.length for score in scores],
    )


async def sleep_while_connected(request: Request, seconds: float) -> None:
    """Sleep. Raises `ClientGoneError` as soon as the client disconnects."""
    receiving = asyncio.ensure_future(request.receive())
    try:
        done, _ = await asyncio.wait({receiving}, timeout=seconds)
    finally:
        receiving.cancel()
    if done:
        raise ClientGoneError


def timeout_of(request: Request) -> float | None:
    """Seconds until the client stops waiting, from its `X-Request-Timeout` header; None without one."""
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise ProblemError("invalid-request", f"{TIMEOUT_HEADER}: {value!r} is no positive number of seconds")
    return timeout_s
