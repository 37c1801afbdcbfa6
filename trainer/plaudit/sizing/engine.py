"""The simulated engine of a replica: admission, fair queueing and batches of `reward_service/engine/batching.py`.

No clock of its own: the caller says when a batch begins and ends. Texts are numbers of tokens.

Failure modes: a request that is admitted and never finished; a bound that the real service does not have.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

SLICE_BATCHES = 4
NEARLY_EMPTY = 1 / 16
MAX_RETRY_AFTER_S = 120
RATE_SMOOTHING = 0.2


@dataclass(eq=False, slots=True)
class Job:
    """One request in the engine."""

    caller: int
    tokens: Sequence[float]
    """Of each text."""
    open_texts: int = 0
    abandoned: bool = False
    """Its client has gone: texts that still wait are dropped."""

    @property
    def total(self) -> float:
        """Tokens of all texts."""
        return sum(self.tokens)


@dataclass(slots=True)
class _Caller:
    jobs: int = 0
    tokens: float = 0.0
    finish: float = 0.0


@dataclass
class Engine:
    """Jobs in, batches out. Admitted jobs are served by weighted fair queueing between callers."""

    batch_tokens: float
    max_queue_tokens: float
    queued_tokens: float = 0.0
    """Admitted and not yet finished."""
    queued_texts: int = 0
    tokens_per_s: float = 0.0
    _waiting: list[tuple[float, int, Job, int, int]] = field(default_factory=list)
    """A heap of slices: virtual finish time, order of arrival, job, first and last text."""
    _callers: dict[int, _Caller] = field(default_factory=dict)
    _virtual: float = 0.0
    _order: int = 0

    def admits(self, job: Job) -> bool:
        """Whether the queue has room for it: the bound, or the caller's equal share of a full queue."""
        tokens = job.total
        if not self.queued_tokens or self.queued_tokens + tokens <= self.max_queue_tokens:
            return True
        if tokens > self.max_queue_tokens and self.queued_tokens <= NEARLY_EMPTY * self.max_queue_tokens:
            return job.caller not in self._callers
        mine = self._callers.get(job.caller)
        largest = max(known.tokens for known in self._callers.values())
        share = self.max_queue_tokens // (len(self._callers) + (mine is None))
        return (mine.tokens if mine else 0.0) + tokens <= share and (
            self.queued_tokens - largest + tokens <= self.max_queue_tokens
        )

    def retry_after_s(self, job: Job) -> float:
        """Seconds that a refused client is asked to wait."""
        excess = self.queued_tokens + min(job.total, self.max_queue_tokens) - self.max_queue_tokens
        wait_s = excess / self.tokens_per_s if self.tokens_per_s else 1.0
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))

    def add(self, job: Job) -> None:
        """Admit a job."""
        job.open_texts = len(job.tokens)
        self.queued_tokens += job.total
        self.queued_texts += len(job.tokens)
        caller = self._callers.setdefault(job.caller, _Caller())
        caller.jobs += 1
        caller.tokens += job.total
        finish = max(self._virtual, caller.finish)
        first, slice_tokens = 0, 0.0
        for text, tokens in enumerate(job.tokens):
            if text > first and slice_tokens + tokens > SLICE_BATCHES * self.batch_tokens:
                finish += slice_tokens
                self._push(finish, job, first, text)
                first, slice_tokens = text, 0.0
            slice_tokens += tokens
        caller.finish = finish + slice_tokens
        self._push(caller.finish, job, first, len(job.tokens))

    def _push(self, finish: float, job: Job, first: int, last: int) -> None:
        self._order += 1
        heapq.heappush(self._waiting, (finish, self._order, job, first, last))

    def take(self) -> tuple[list[tuple[Job, int]], float, list[Job]]:
        """The next batch as jobs and numbers of texts, its tokens, and jobs that were dropped because they are over."""
        batch: list[tuple[Job, int]] = []
        dropped: list[Job] = []
        tokens = 0.0
        while self._waiting:
            finish, order, job, first, last = self._waiting[0]
            if job.abandoned:
                heapq.heappop(self._waiting)
                if job.open_texts:
                    job.open_texts = 0
                    self._forget(job)
                    dropped.append(job)
                continue
            text = first
            while text < last and (not tokens or tokens + job.tokens[text] <= self.batch_tokens):
                tokens += job.tokens[text]
                text += 1
            if text > first:
                batch.append((job, text - first))
            if text < last:
                heapq.heapreplace(self._waiting, (finish, order, job, text, last))
                break
            heapq.heappop(self._waiting)
        self._virtual += tokens / max(1, len(self._callers))
        return batch, tokens, dropped

    def finish(self, batch: Sequence[tuple[Job, int]], tokens: float, seconds: float) -> list[Job]:
        """The batch is scored: the jobs that are finished with it."""
        rate = tokens / max(seconds, 1e-6)
        smoothed = (1 - RATE_SMOOTHING) * self.tokens_per_s + RATE_SMOOTHING * rate
        self.tokens_per_s = smoothed if self.tokens_per_s else rate
        done = []
        for job, texts in batch:
            if not job.open_texts:
                continue  # dropped meanwhile
            job.open_texts -= texts
            if job.open_texts == 0:
                self._forget(job)
                done.append(job)
        return done

    def _forget(self, job: Job) -> None:
        self.queued_tokens -= job.total
        self.queued_texts -= len(job.tokens)
        caller = self._callers[job.caller]
        caller.jobs -= 1
        caller.tokens -= job.total
        if not caller.jobs:
            del self._callers[job.caller]
