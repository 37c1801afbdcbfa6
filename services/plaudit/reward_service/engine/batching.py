"""Continuous batching: texts in, logits out, with a bounded queue between. Knows nothing of HTTP, torch or models.

Two threads a service: one tokenises whatever has arrived, one runs the model on whatever is tokenised (one such thread
for each replica of the model). A batch forms while the previous one runs, so nobody ever waits for company. The event
loop only waits for futures.

Callers share the model fairly. A request is cut into slices, and each slice gets the time at which it would be finished
if the callers' requests ran side by side at the same speed (weighted fair queueing: Demers, Keshav and Shenker, 1989).
Slices are served in the order of those times, so a caller with one text passes a caller with thousands.
"""

import asyncio
import bisect
import heapq
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from plaudit.reward_service.engine.metrics import Metrics
from plaudit.reward_service.problems import RETRY_AFTER_DRAIN_S, ProblemError, draining

Turn = tuple[str, str]
"""A role and what it said."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation whose last turn is the response to judge."""

    turns: tuple[Turn, ...]


Plain = tuple[str, str | None]
"""One text to judge, or a pair that the tokenizer joins."""
Text = Plain | Chat
"""What may be judged: a text, a pair, or a conversation, which the judge's chat template writes out."""
Logits = tuple[float, ...]
"""One row of the model's output, a number for each label."""

CHARS_PER_TOKEN_LIMIT = 64
"""A text is cut to this many characters for each token the model can see, before it is tokenised: a megabyte would
otherwise hold the tokenizer for a second. English has about 4 characters a token."""
CHARS_PER_TOKEN_ESTIMATE = 4
"""Of plain ASCII. Other texts are taken for a token a character: Chinese is, and combining marks are nearly."""
SLICE_BATCHES = 4
"""Batches that a slice may fill. Requests of up to that size are answered one after the other, larger ones in turns."""
NEARLY_EMPTY = 1 / 16
"""Share of its bound up to which a queue takes a job that is larger than the whole bound."""
SLICE_CHARS = 32 * 1024
"""Characters tokenised in one go. The tokenizer takes some 200 bytes for each of them while it works."""
MAX_RETRY_AFTER_S = 120
RATE_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised text. `type_ids` is None when the tokenizer makes none that the model takes."""

    ids: Sequence[int]
    type_ids: Sequence[int] | None = None
    truncated: bool = False
    refused: str | None = None
    """Why the chat template makes nothing of it, if it doesn't."""


class Scorer(Protocol):
    """A loaded model. `encode` and `score` run in different threads; a replica's `score` never runs twice at once."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def packed(self) -> bool:
        """Whether a batch costs the sum of its lengths (no padding) rather than rows times the longest."""
        ...

    @property
    def replicas(self) -> int: ...

    def encode(self, texts: Sequence[Text]) -> list[Encoded]: ...
    def score(self, batch: Sequence[Encoded], replica: int) -> Sequence[Logits]:
        """One row for each text, in order. Raises `ScorerLostError` when no later call can succeed."""
        ...


class ScorerLostError(Exception):
    """The device or the model is gone for good; the process should be restarted."""


class TemporaryOutOfMemory(Exception):
    """The device lacks the memory for this batch. It had it when the service started, so another try may succeed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer to one job: a row of logits for each text, by the model `scorer`, and where the time went."""

    logits: list[Logits]
    truncated: list[int]
    lengths: list[int]
    """Tokens of each text, as the model saw it."""
    scorer: Scorer
    tokenize_s: float
    queue_s: float
    inference_s: float


@dataclass(eq=False, slots=True)
class Job:
    """One request's texts. They are admitted together, judged by one model, and answered together."""

    texts: Sequence[Text]
    """Emptied as they are tokenised; `count` says how many there were."""
    scorer: Scorer
    generation: int
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Scored]"
    tokens: int
    """What the job holds of the queue's bound: estimated from characters until it is tokenised."""
    admitted_at: float
    deadline: float | None = None
    caller: str = ""
    count: int = 0
    items: "list[_Item]" = field(default_factory=list)
    open_items: int = 0
    over: bool = False
    """Answered, failed or abandoned: whatever is still waiting of it is dropped before the forward pass."""
    tokenized_at: float = 0.0
    tokenize_s: float = 0.0
    first_batch_at: float | None = None


@dataclass(eq=False, slots=True)
class _Item:
    job: Job
    index: int
    encoded: Encoded
    order: int
    finish: float = 0.0
    """When its slice would be finished if callers ran side by side; the least is served first."""
    logits: Logits | None = None
    taken: bool = False

    @property
    def length(self) -> int:
        return len(self.encoded.ids)

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return (self.job.generation, self.length, self.order)


@dataclass(eq=False, slots=True)
class _Slice:
    """Texts `start` to `stop` of a job, which are tokenised together."""

    job: Job
    start: int
    stop: int
    tokens: int
    """Estimated."""
    finish: float
    order: int

    def __lt__(self, other: "_Slice") -> bool:
        return (self.finish, self.order) < (other.finish, other.order)


@dataclass(eq=False, slots=True)
class _Caller:
    """Somebody with open jobs."""

    jobs: int = 0
    tokens: int = 0
    finish: float = 0.0
    """When the last of its slices would be finished."""


class BatchQueue:
    """Tokenised texts that wait for the model. The one whose turn it is is always in the next batch: nothing starves.

    Without padding a batch is filled in order of turns, for one caller that is the order of arrival. With padding it is
    filled with the length neighbours of the first, because a batch then costs as much as its longest text times its
    rows.
    """

    def __init__(self) -> None:
        self._arrival: list[tuple[float, int, _Item]] = []
        """A heap, in order of turns: when it would be finished, and of two the earlier one."""
        self._by_length: list[_Item] = []

    def add(self, item: _Item) -> None:
        heapq.heappush(self._arrival, (item.finish, item.order, item))
        if not item.job.scorer.packed:
            bisect.insort(self._by_length, item, key=lambda waiting: waiting.sort_key)

    def take(self, budget: int) -> tuple[list[_Item], list[_Item]]:
        """The next batch, of at most `budget` tokens or one text, and the abandoned texts found on the way."""
        dropped: list[_Item] = []
        now = time.monotonic()
        while self._arrival:
            oldest = self._arrival[0][2]
            if oldest.taken:
                heapq.heappop(self._arrival)
            elif _abandoned(oldest, now):
                self._drop(heapq.heappop(self._arrival)[2], dropped)
            else:
                batch = (
                    self._take_in_order(budget, now, dropped)
                    if oldest.job.scorer.packed
                    else self._take_neighbours(oldest, budget, now, dropped)
                )
                return batch, dropped
        return [], dropped

    def _drop(self, item: _Item, dropped: list[_Item]) -> None:
        item.taken = True
        dropped.append(item)
        if not item.job.scorer.packed:
            del self._by_length[
                bisect.bisect_left(self._by_length, item.sort_key, key=lambda waiting: waiting.sort_key)
            ]

    def _take_in_order(self, budget: int, now: float, dropped: list[_Item]) -> list[_Item]:
        batch: list[_Item] = []
        tokens = 0
        while self._arrival:
            item = self._arrival[0][2]
            if batch and (tokens + item.length > budget or item.job.generation != batch[0].job.generation):
                break
            heapq.heappop(self._arrival)
            item.taken = True
            if _abandoned(item, now):
                dropped.append(item)
                continue
            batch.append(item)
            tokens += item.length
        return batch

    def _take_neighbours(self, oldest: _Item, budget: int, now: float, dropped: list[_Item]) -> list[_Item]:
        ranked = self._by_length
        low = bisect.bisect_left(ranked, oldest.sort_key, key=lambda waiting: waiting.sort_key)
        high = low + 1
        rows, longest = 1, oldest.length

        def fits(item: _Item) -> bool:
            same_model = item.job.generation == oldest.job.generation
            return same_model and max(longest, item.length) * (rows + 1) <= budget

        while True:
            shorter = ranked[low - 1] if low > 0 and fits(ranked[low - 1]) else None
            longer = ranked[high] if high < len(ranked) and fits(ranked[high]) else None
            if shorter is None and longer is None:
                break
            if longer is None or (
                shorter is not None and oldest.length - shorter.length <= longer.length - oldest.length
            ):
                low -= 1
            else:
                high += 1
                longest = longer.length
            rows += 1
        window = ranked[low:high]
        del ranked[low:high]
        batch: list[_Item] = []
        for item in window:
            item.taken = True
            (dropped if _abandoned(item, now) else batch).append(item)
        return batch


def _abandoned(item: _Item, now: float) -> bool:
    job = item.job
    return job.over or (job.deadline is not None and now >= job.deadline)


class Engine:
    """Admits jobs, tokenises, batches, runs the model, answers. Start it with `start()`, end it with `close()`.

    `max_queue_tokens` bounds what is admitted and not yet answered. Admission is atomic: all of a job or none of it. A
    job larger than the whole bound is admitted only into a queue that is nearly empty. A full queue still takes a
    caller's job, as long as the caller has no more than its share and all but the largest caller together no more than
    the bound.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        batch_tokens: int,
        max_queue_tokens: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.scorer = scorer
        self.metrics = metrics or Metrics()
        self.batch_tokens = batch_tokens
        self.max_queue_tokens = max_queue_tokens
        self.draining = False
        self.failure: str | None = None
        """Why the service can't score any more, when it can't."""
        self.tokens_per_s = 0.0
        """Measured throughput, smoothed; 0 until the first batch."""
        self._generation = 0
        self._queued_tokens = 0
        self._queued_items = 0
        self._order = 0
        self._open: set[Job] = set()
        self._arrived: list[_Slice] = []
        self._callers: dict[str, _Caller] = {}
        self._virtual = 0.0
        """Tokens that each caller would have got by now, if all had run side by side."""
        self._waiting = BatchQueue()
        self._closing = False
        lock = threading.Lock()
        self._lock = lock
        self._to_tokenize = threading.Condition(lock)
        self._to_score = threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._guard, args=(self._tokenize_loop,), daemon=True, name="tokenize")
        ]
        # One thread for each replica: a model's forward pass fills its device, a second thread would only add waiting.
        self._threads += [
            threading.Thread(target=self._guard, args=(self._score_loop, replica), daemon=True, name=f"score-{replica}")
            for replica in range(scorer.replicas)
        ]
        self._observe = [self.metrics.phase.labels(phase).observe for phase in ("tokenize", "queue", "inference")]
        self.metrics.queue_items.set_function(lambda: self._queued_items)
        self.metrics.queue_tokens.set_function(lambda: self._queued_tokens)
        self.metrics.model.labels(scorer.id, scorer.revision, scorer.dtype).set(1)

    def start(self) -> "Engine":
        for thread in self._threads:
            thread.start()
        return self

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the threads after the batch they are in; whatever still waits is answered with 503."""
        with self._lock:
            self._closing = True
            self.draining = True
            self._to_tokenize.notify_all()
            self._to_score.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)
        self.fail_open_jobs()

    def fail_open_jobs(self) -> None:
        """Answer with 503 whatever has been admitted and isn't done."""
        self._fail_everything(draining())

    @property
    def idle(self) -> bool:
        return self._queued_items == 0

    @property
    def queued_tokens(self) -> int:
        return self._queued_tokens

    def unready(self) -> str | None:
        """Why no work should be sent here, or None."""
        if self.failure is not None:
            return self.failure
        if self.draining:
            return "draining: the service is shutting down"
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        return f"thread {', '.join(dead)} is not running" if dead else None

    def require_open(self) -> None:
        """Raise `ProblemError` when nothing can be admitted."""
        if self.failure is not None:
            raise ProblemError("not-ready", self.failure, retry_after_s=RETRY_AFTER_DRAIN_S)
        if self.draining:
            raise draining()

    def replace(self, scorer: Scorer) -> None:
        """Let `scorer` judge everything admitted from now on; what was admitted before keeps its model."""
        old = self.scorer
        if scorer.replicas != old.replicas:
            raise ValueError(f"the new model has {scorer.replicas} replicas, the old one {old.replicas}")
        with self._lock:
            self.scorer = scorer
            self._generation += 1
        self.metrics.model.remove(old.id, old.revision, old.dtype)
        self.metrics.model.labels(scorer.id, scorer.revision, scorer.dtype).set(1)

    def submit(self, texts: Sequence[Text], *, deadline: float | None = None, caller: str = "") -> Job:
        """Admit all of `texts` or raise `ProblemError`. Await `job.future`; call `abandon(job)` to give up on it.

        `deadline` is on the clock of `time.monotonic()`. Callers are served fairly. Must be called in a running event
        loop.
        """
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        with self._lock:
            self.require_open()
            scorer = self.scorer
            estimates = [_estimated_tokens(text, scorer.max_tokens) for text in texts]
            tokens = sum(estimates)
            if not self._has_room(tokens, caller):
                raise self._queue_full(tokens)
            job = Job(texts, scorer, self._generation, loop, loop.create_future(), tokens, now, deadline, caller)
            job.count = job.open_items = len(texts)
            self._open.add(job)
            self._queued_tokens += tokens
            self._queued_items += len(texts)
            self._slice(job, estimates)
            self._to_tokenize.notify()
        self.metrics.admitted_items.inc(len(texts))
        return job

    def _has_room(self, tokens: int, caller: str) -> bool:
        if not self._queued_tokens or self._queued_tokens + tokens <= self.max_queue_tokens:
            return True
        if tokens > self.max_queue_tokens and self._queued_tokens <= NEARLY_EMPTY * self.max_queue_tokens:
            return caller not in self._callers
        mine = self._callers.get(caller)
        largest = max(known.tokens for known in self._callers.values())
        share = self.max_queue_tokens // (len(self._callers) + (mine is None))
        return (mine.tokens if mine else 0) + tokens <= share and (
            self._queued_tokens - largest + tokens <= self.max_queue_tokens
        )

    def _slice(self, job: Job, estimates: Sequence[int]) -> None:
        """Put the job's texts in line, a slice at a time."""
        caller = self._callers.setdefault(job.caller, _Caller())
        caller.jobs += 1
        caller.tokens += job.tokens
        finish = max(self._virtual, caller.finish)
        most = SLICE_BATCHES * self.batch_tokens
        most_chars = job.scorer.max_tokens * CHARS_PER_TOKEN_LIMIT
        start = tokens = chars = 0
        for index, estimate in enumerate(estimates):
            size = min(_chars(job.texts[index]), most_chars)
            if index > start and (tokens + estimate > most or chars + size > SLICE_CHARS):
                finish += tokens
                self._push(_Slice(job, start, index, tokens, finish, 0))
                start, tokens, chars = index, 0, 0
            tokens += estimate
            chars += size
        caller.finish = finish + tokens
        self._push(_Slice(job, start, len(estimates), tokens, caller.finish, 0))

    def _push(self, part: _Slice) -> None:
        self._order += 1
        part.order = self._order
        heapq.heappush(self._arrived, part)

    def abandon(self, job: Job) -> None:
        """The client has gone or its deadline has passed: what hasn't run yet will not."""
        job.over = True
        job.future.cancel()

    def _queue_full(self, tokens: int) -> ProblemError:
        excess = self._queued_tokens + min(tokens, self.max_queue_tokens) - self.max_queue_tokens
        wait_s = excess / self.tokens_per_s if self.tokens_per_s else 1.0
        return ProblemError(
            "queue-full",
            f"{self._queued_tokens} tokens are waiting, this request adds about {tokens}, and the queue holds "
            f"{self.max_queue_tokens}",
            retry_after_s=max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s))),
        )

    def _guard(self, target: Callable[..., None], *args: int) -> None:
        try:
            target(*args)
        except BaseException as error:
            self.failure = f"the {threading.current_thread().name} thread died: {error!r}"
            self._fail_everything(ProblemError("not-ready", self.failure, retry_after_s=RETRY_AFTER_DRAIN_S))
            if not isinstance(error, ScorerLostError):
                raise

    def _tokenize_loop(self) -> None:
        while True:
            with self._lock:
                while not self._arrived and not self._closing:
                    self._to_tokenize.wait()
                if self._closing:
                    return
                parts = self._take_arrived()
            self._tokenize_parts(parts)
            del parts  # while this thread is idle, they would keep the model in memory that they were for

    def _tokenize_parts(self, parts: list[_Slice]) -> None:
        started = time.monotonic()
        done = [(part, self._tokenize(part, started)) for part in parts]
        finished = time.monotonic()
        with self._lock:
            for part, items in done:
                job = part.job
                if not items or job not in self._open:
                    continue  # failed along with everything while it was tokenised
                if not job.items:
                    job.tokenized_at = finished
                    job.tokenize_s = finished - job.admitted_at
                more = sum(item.length for item in items) - part.tokens
                self._queued_tokens += more
                job.tokens += more
                self._callers[job.caller].tokens += more
                job.items += items
                for item in items:
                    self._order += 1
                    item.order = self._order
                    self._waiting.add(item)
            self._to_score.notify_all()

    def _take_arrived(self) -> list[_Slice]:
        """About one batch: more would keep the model waiting for texts that it can't use yet."""
        parts = [heapq.heappop(self._arrived)]
        tokens = parts[0].tokens
        while self._arrived and tokens + self._arrived[0].tokens <= self.batch_tokens:
            parts.append(heapq.heappop(self._arrived))
            tokens += parts[-1].tokens
        return parts

    def _tokenize(self, part: _Slice, now: float) -> list[_Item]:
        """The slice's items; none where its job has come to an end."""
        job = part.job
        if job.over or (job.deadline is not None and now >= job.deadline):
            self.metrics.dropped_items.inc(part.stop - part.start)
            self._resolve(
                [(job, ProblemError("deadline-exceeded", "the deadline passed before the text was tokenised"))]
            )
            return []
        try:
            encodings = job.scorer.encode(job.texts[part.start : part.stop])
        except Exception as error:
            self._resolve([(job, _scoring_failed(error, None))])
            return []
        for index, encoded in enumerate(encodings, part.start):
            if encoded.refused is not None:
                problem = ProblemError("template-refused", f"items[{index}]: {encoded.refused}", item=index)
                self._resolve([(job, problem)])
                return []
            if not encoded.ids:
                problem = ProblemError("no-tokens", f"items[{index}] is empty for this model's tokenizer", item=index)
                self._resolve([(job, problem)])
                return []
        if part.stop == job.count:
            job.texts = ()  # a full queue need not hold them as well
        return [_Item(job, index, encoded, 0, part.finish) for index, encoded in enumerate(encodings, part.start)]

    def _score_loop(self, replica: int) -> None:
        while True:
            with self._lock:
                while True:
                    if self._closing:
                        return
                    batch, dropped = self._waiting.take(self.batch_tokens)
                    if batch or dropped:
                        break
                    self._to_score.wait()
            self._run(batch, dropped, replica)
            del batch, dropped  # as in the other thread

    def _run(self, batch: list[_Item], dropped: list[_Item], replica: int) -> None:
        started = time.monotonic()
        with self._lock:
            self._virtual += sum(item.length for item in batch) / max(1, len(self._callers))
            for item in batch:
                if item.job.first_batch_at is None:
                    item.job.first_batch_at = started
        if dropped:
            self.metrics.dropped_items.inc(len(dropped))
            late = ProblemError("deadline-exceeded", "the deadline passed before the model ran")
            self._resolve([(job, late) for job in dict.fromkeys(item.job for item in dropped)])
        if batch:
            self._resolve(self._score(batch, replica))
            self._record(batch, time.monotonic() - started)

    def _score(self, batch: list[_Item], replica: int) -> list[tuple[Job, ProblemError | None]]:
        """Run the model, and halve a batch that fails until the texts that make it fail stand alone."""
        try:
            rows = batch[0].job.scorer.score([item.encoded for item in batch], replica)
            if len(rows) != len(batch):
                raise RuntimeError(f"the model gave {len(rows)} rows for {len(batch)} texts")
        except ScorerLostError:
            raise
        except Exception as error:
            if len(batch) == 1:
                self.metrics.failed_items.inc()
                return [(batch[0].job, _scoring_failed(error, batch[0].index))]
            middle = len(batch) // 2
            return self._score(batch[:middle], replica) + self._score(batch[middle:], replica)
        outcomes: list[tuple[Job, ProblemError | None]] = []
        scored: list[_Item] = []
        for item, row in zip(batch, rows, strict=True):
            if not all(map(math.isfinite, row)):
                self.metrics.failed_items.inc()
                problem = ProblemError(
                    "non-finite-score", f"the model's logits for items[{item.index}] are not finite", item=item.index
                )
                outcomes.append((item.job, problem))
                continue
            item.logits = tuple(row)
            scored.append(item)
        self.metrics.scored_items.inc(len(scored))
        with self._lock:
            for item in scored:
                item.job.open_items -= 1
                if item.job.open_items == 0:
                    outcomes.append((item.job, None))
        return outcomes

    def _record(self, batch: list[_Item], elapsed_s: float) -> None:
        lengths = [item.length for item in batch]
        tokens = sum(lengths)
        padded = tokens if batch[0].job.scorer.packed else max(lengths) * len(batch)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.padding_share.observe(1 - tokens / padded)
        rate = tokens / max(elapsed_s, 1e-6) * self.scorer.replicas
        self.tokens_per_s = (
            rate if not self.tokens_per_s else ((1 - RATE_SMOOTHING) * self.tokens_per_s + RATE_SMOOTHING * rate)
        )

    def _resolve(self, outcomes: Iterable[tuple[Job, ProblemError | None]]) -> None:
        """Hand jobs that are over to their event loops, one wake-up for each loop, and free their room in the queue."""
        now = time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, Scored | ProblemError]]] = {}
        for job, problem in outcomes:
            with self._lock:
                if job not in self._open:
                    continue
                self._open.remove(job)
                self._queued_tokens -= job.tokens
                self._queued_items -= job.count
                caller = self._callers[job.caller]
                caller.jobs -= 1
                caller.tokens -= job.tokens
                if not caller.jobs:
                    del self._callers[job.caller]
                job.over = True
            answer = problem or self._answer(job, now)
            # An item knows its job. If the job went on knowing its items, only a full collection would free either.
            job.items = []
            by_loop.setdefault(job.loop, []).append((job, answer))
        for loop, answers in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_deliver, answers)

    def _answer(self, job: Job, now: float) -> Scored:
        first_batch_at = job.first_batch_at or now
        scored = Scored(
            logits=[item.logits for item in job.items if item.logits is not None],
            truncated=[item.index for item in job.items if item.encoded.truncated],
            lengths=[item.length for item in job.items],
            scorer=job.scorer,
            tokenize_s=job.tokenize_s,
            queue_s=first_batch_at - job.tokenized_at,
            inference_s=now - first_batch_at,
        )
        observe_tokenize, observe_queue, observe_inference = self._observe
        observe_tokenize(scored.tokenize_s)
        observe_queue(scored.queue_s)
        observe_inference(scored.inference_s)
        return scored

    def _fail_everything(self, problem: ProblemError) -> None:
        with self._lock:
            jobs = list(self._open)
            self._arrived = []
            self._waiting = BatchQueue()
        self._resolve([(job, problem) for job in jobs])


def _deliver(answers: list[tuple[Job, Scored | ProblemError]]) -> None:
    for job, answer in answers:
        if job.future.done():
            continue
        if isinstance(answer, ProblemError):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)


def _estimated_tokens(text: Text, max_tokens: int) -> int:
    if all(part.isascii() for part in _parts(text)):
        return min(max_tokens, 2 + _chars(text) // CHARS_PER_TOKEN_ESTIMATE)
    return min(max_tokens, 2 + _chars(text))


def _chars(text: Text) -> int:
    return sum(map(len, _parts(text)))


def _parts(text: Text) -> Sequence[str]:
    if isinstance(text, Chat):
        return [content for _, content in text.turns]
    first, second = text
    return (first,) if second is None else (first, second)


def _scoring_failed(error: Exception, index: int | None) -> ProblemError:
    where = "these texts" if index is None else f"items[{index}]"
    if isinstance(error, TemporaryOutOfMemory | MemoryError):
        detail = f"the device lacks memory for {where}: {error}"
        return ProblemError("out-of-memory", detail, item=index, retry_after_s=RETRY_AFTER_DRAIN_S)
    return ProblemError("scoring-failed", f"the model failed on {where}: {type(error).__name__}: {error}", item=index)
