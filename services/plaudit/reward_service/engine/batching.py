"""Dynamic batching: texts in, logits out, through a bounded queue. Independent of HTTP, torch and any model.

One thread tokenises the texts that have arrived. Each replica of the model has a thread that runs the model on
tokenised texts. A batch forms while the previous one runs, so no text waits for a batch to fill. The event loop
only waits for futures.

Callers share the model by weighted fair queueing (Demers, Keshav and Shenker, 1989). A request is cut into slices. Each
slice gets a virtual finish time: when it would be finished if the requests of all callers ran at the same time and
speed. Slices are served in the order of these times, so a caller with one text overtakes a caller with thousands.

Failure modes: an admitted request that is never answered; a batch that fails requests which have no part in the error;
a caller that starves.
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
"""Before a text is tokenised, it is cut to this many characters for each token that the model can see: tokenising a
megabyte takes a second. English has about 4 characters a token."""
CHARS_PER_TOKEN_ESTIMATE = 4
"""For ASCII. Any other text is estimated at one token a character, which is right for Chinese and nearly right for
combining marks."""
SLICE_BATCHES = 4
"""Batches that one slice may fill. A request of up to this size is one slice; larger requests are served in turns."""
NEARLY_EMPTY = 1 / 16
"""A job larger than the whole queue is admitted while the queue is filled to at most this share of its bound."""
SLICE_CHARS = 32 * 1024
"""Characters tokenised in one call. The tokenizer uses about 200 bytes of memory for each."""
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
    def id(self) -> str:
        """The model's name, as it was configured."""
        ...

    @property
    def revision(self) -> str:
        """A hash of the model's files."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each logit."""
        ...

    @property
    def max_tokens(self) -> int:
        """Tokens that the model can see of one text."""
        ...

    @property
    def dtype(self) -> str:
        """The number format that the model computes in."""
        ...

    @property
    def packed(self) -> bool:
        """Whether a batch costs the sum of its lengths (no padding) rather than rows times the longest."""
        ...

    @property
    def replicas(self) -> int:
        """Copies of the model that can score at the same time."""
        ...

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokenise texts, in order."""
        ...

    def score(self, batch: Sequence[Encoded], replica: int) -> Sequence[Logits]:
        """One row for each text, in order. Raises `ScorerLostError` when no later call can succeed."""
        ...


class ScorerLostError(Exception):
    """The device or the model is lost; only a restart of the process can help."""


class TemporaryOutOfMemory(Exception):
    """The device lacks memory for this batch. It had enough when the service started, so a retry may succeed."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The result of one job: a row of logits for each text, the model that made them, and the time of each phase."""

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
    """One request's texts. They are admitted together, scored by one model, and answered together."""

    texts: Sequence[Text]
    """Emptied once all are tokenised; `count` stays."""
    scorer: Scorer
    generation: int
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Scored]"
    tokens: int
    """The job's share of the queue's bound: estimated from characters until the texts are tokenised."""
    admitted_at: float
    deadline: float | None = None
    caller: str = ""
    places: Sequence[int] | None = None
    """Which items of the request the texts are, where others of it need no score."""
    count: int = 0
    items: "list[_Item]" = field(default_factory=list)
    open_items: int = 0
    over: bool = False
    """Answered, failed or abandoned. Its texts that still wait are dropped before the forward pass."""
    tokenized_at: float = 0.0
    tokenize_s: float = 0.0
    first_batch_at: float | None = None

    def place(self, index: int) -> int:
        """Which item of the request text `index` is."""
        return index if self.places is None else self.places[index]


@dataclass(eq=False, slots=True)
class _Item:
    job: Job
    index: int
    encoded: Encoded
    order: int
    finish: float = 0.0
    """The virtual finish time of its slice; the smallest is served first."""
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
    """A caller with open jobs."""

    jobs: int = 0
    tokens: int = 0
    finish: float = 0.0
    """The virtual finish time of its last slice."""


class BatchQueue:
    """Tokenised texts that wait for the model. The text with the smallest finish time is always in the next batch.

    Without padding, a batch is filled in order of finish time; for a single caller that is the order of arrival. With
    padding, it is filled with the texts closest in length to the first, because a padded batch costs its longest text
    times its rows.
    """

    def __init__(self) -> None:
        self._arrival: list[tuple[float, int, _Item]] = []
        """A heap, ordered by finish time, then by arrival."""
        self._by_length: list[_Item] = []

    def add(self, item: _Item) -> None:
        """Queue a text."""
        heapq.heappush(self._arrival, (item.finish, item.order, item))
        if not item.job.scorer.packed:
            bisect.insort(self._by_length, item, key=lambda waiting: waiting.sort_key)

    def take(self, budget: int) -> tuple[list[_Item], list[_Item]]:
        """The next batch, of at most `budget` tokens or a single text, and the abandoned texts that were removed."""
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

    Admission control: `max_queue_tokens` bounds the tokens that are admitted and not yet answered. A job is admitted
    whole or refused whole. A job larger than the bound is admitted only when the queue is nearly empty. A full queue
    still admits a caller that stays within an equal share of the bound, as long as all callers but the largest stay
    within the bound together.
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
        """Why the service can no longer score; None while it can."""
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
        """The virtual time: tokens that each caller would have been served by now at equal speed."""
        self._waiting = BatchQueue()
        self._closing = False
        lock = threading.Lock()
        self._lock = lock
        self._to_tokenize = threading.Condition(lock)
        self._to_score = threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._guard, args=(self._tokenize_loop,), daemon=True, name="tokenize")
        ]
        # One thread for each replica: a forward pass fills its device, so a second thread would only wait.
        self._threads += [
            threading.Thread(target=self._guard, args=(self._score_loop, replica), daemon=True, name=f"score-{replica}")
            for replica in range(scorer.replicas)
        ]
        self._observe = [self.metrics.phase.labels(phase).observe for phase in ("tokenize", "queue", "inference")]
        self.metrics.queue_items.set_function(lambda: self._queued_items)
        self.metrics.queue_tokens.set_function(lambda: self._queued_tokens)
        self.metrics.model.labels(scorer.id, scorer.revision, scorer.dtype).set(1)

    def start(self) -> "Engine":
        """Start the threads; the engine itself."""
        for thread in self._threads:
            thread.start()
        return self

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop the threads after their current batch. Requests that still wait get 503."""
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
        """Answer every admitted request that isn't done with 503."""
        self._fail_everything(draining())

    @property
    def idle(self) -> bool:
        """Whether everything admitted has been answered."""
        return self._queued_items == 0

    @property
    def queued_tokens(self) -> int:
        """Tokens admitted and not yet answered."""
        return self._queued_tokens

    def unready(self) -> str | None:
        """Why the readiness probe should fail, or None."""
        if self.failure is not None:
            return self.failure
        if self.draining:
            return "draining: the service is shutting down"
        dead = [thread.name for thread in self._threads if not thread.is_alive()]
        return f"thread {', '.join(dead)} is not running" if dead else None

    def require_open(self) -> None:
        """Raise `ProblemError` when the engine admits nothing: it drains or has failed."""
        if self.failure is not None:
            raise ProblemError("not-ready", self.failure, retry_after_s=RETRY_AFTER_DRAIN_S)
        if self.draining:
            raise draining()

    def replace(self, scorer: Scorer) -> None:
        """Use `scorer` for jobs admitted from now on; jobs admitted before keep their model.

        Raises `ValueError` when the number of replicas differs.
        """
        old = self.scorer
        if scorer.replicas != old.replicas:
            raise ValueError(f"the new model has {scorer.replicas} replicas, the old one {old.replicas}")
        with self._lock:
            self.scorer = scorer
            self._generation += 1
        self.metrics.model.remove(old.id, old.revision, old.dtype)
        self.metrics.model.labels(scorer.id, scorer.revision, scorer.dtype).set(1)

    def submit(
        self,
        texts: Sequence[Text],
        *,
        deadline: float | None = None,
        caller: str = "",
        places: Sequence[int] | None = None,
    ) -> Job:
        """Admit all of `texts` or raise `ProblemError`. Await `job.future`; call `abandon(job)` to cancel it.

        `deadline` is on the clock of `time.monotonic()`. `caller` is the key of fair queueing. `places` are the
        texts' indices in the request, for error messages. Must be called in a running event loop.
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
            job = Job(
                texts, scorer, self._generation, loop, loop.create_future(), tokens, now, deadline, caller, places
            )
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
        """Queue the job's texts for tokenisation, in slices."""
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
        """Drop what has not run yet: the client has disconnected, or its deadline has passed."""
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
            del parts  # an idle thread would otherwise keep a replaced model in memory

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
        """Slices of about one batch: tokenising more would delay the next forward pass."""
        parts = [heapq.heappop(self._arrived)]
        tokens = parts[0].tokens
        while self._arrived and tokens + self._arrived[0].tokens <= self.batch_tokens:
            parts.append(heapq.heappop(self._arrived))
            tokens += parts[-1].tokens
        return parts

    def _tokenize(self, part: _Slice, now: float) -> list[_Item]:
        """The slice's items; none if its job is over."""
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
                place = job.place(index)
                problem = ProblemError("template-refused", f"items[{place}]: {encoded.refused}", item=place)
                self._resolve([(job, problem)])
                return []
            if not encoded.ids:
                place = job.place(index)
                problem = ProblemError("no-tokens", f"items[{place}] is empty for this model's tokenizer", item=place)
                self._resolve([(job, problem)])
                return []
        if part.stop == job.count:
            job.texts = ()  # a full queue would otherwise hold each text twice
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
            del batch, dropped  # for the same reason

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
        """Run the model. A batch that fails is bisected until each failing text is alone."""
        try:
            rows = batch[0].job.scorer.score([item.encoded for item in batch], replica)
            if len(rows) != len(batch):
                raise RuntimeError(f"the model gave {len(rows)} rows for {len(batch)} texts")
        except ScorerLostError:
            raise
        except Exception as error:
            if len(batch) == 1:
                self.metrics.failed_items.inc()
                return [(batch[0].job, _scoring_failed(error, batch[0].job.place(batch[0].index)))]
            middle = len(batch) // 2
            return self._score(batch[:middle], replica) + self._score(batch[middle:], replica)
        outcomes: list[tuple[Job, ProblemError | None]] = []
        scored: list[_Item] = []
        for item, row in zip(batch, rows, strict=True):
            if not all(map(math.isfinite, row)):
                self.metrics.failed_items.inc()
                place = item.job.place(item.index)
                problem = ProblemError(
                    "non-finite-score", f"the model's logits for items[{place}] are not finite", item=place
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
        """Hand finished jobs to their event loops, one wake-up for each loop, and free their share of the queue."""
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
            # Break the reference cycle between job and items, which only a full garbage collection would free.
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
    if all(part.isascii() for part in parts_of(text)):
        return min(max_tokens, 2 + _chars(text) // CHARS_PER_TOKEN_ESTIMATE)
    return min(max_tokens, 2 + _chars(text))


def _chars(text: Text) -> int:
    return sum(map(len, parts_of(text)))


def parts_of(text: Text) -> Sequence[str]:
    """What there is to read of it: a text, both of a pair, or what each turn says."""
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
