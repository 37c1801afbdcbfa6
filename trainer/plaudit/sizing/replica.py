"""A simulated replica: a front end that handles one request after the other, then the engine and its forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import simpy

from plaudit.sizing.engine import Engine, Job
from plaudit.sizing.service_times import ServiceTimes


class Outcome(Enum):
    """What becomes of one request at one replica."""

    SCORED = "scored"
    REFUSED = "refused"
    """429: the queue is full."""
    LOST = "lost"
    """The replica died before it answered, or has not been reached."""
    DROPPED = "dropped"
    """The client had gone."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request at one replica."""

    job: Job
    done: simpy.Event
    """Succeeds with an `Outcome`."""
    retry_after_s: float = 0.0

    def settle(self, outcome: Outcome) -> None:
        """Say what became of it, once."""
        if not self.done.triggered:
            self.done.succeed(outcome)


class Station:
    """Work that is done one piece after the other, in order of arrival."""

    def __init__(self, environment: simpy.Environment) -> None:
        self._environment = environment
        self._free_at = 0.0

    def delay_s(self, work_s: float) -> float:
        """Seconds from now until a piece of so many seconds is done; it takes its place at once."""
        self._free_at = max(self._environment.now, self._free_at) + work_s
        return self._free_at - self._environment.now


class Replica:
    """One reward service. `speed` 0.5 takes twice as long for everything."""

    def __init__(
        self,
        environment: simpy.Environment,
        times: ServiceTimes,
        *,
        batch_tokens: float,
        max_queue_tokens: float,
        speed: float = 1.0,
    ) -> None:
        self.up = True
        self.in_progress = 0
        """Requests that the balancer has sent here and that are not answered."""
        self.busy_s = 0.0
        """Seconds of forward passes so far."""
        self.batches = 0
        self.batch_tokens = 0.0
        """Sum over batches."""
        self.engine = Engine(batch_tokens, max_queue_tokens)
        self._environment = environment
        self._times = times
        self._speed = speed
        self._front = Station(environment)
        self.scoring = False
        """Whether the model runs."""
        self._taken_s = 0.0
        """Seconds that requests have taken from the forward pass under way."""
        self._life = 0
        self._tickets: dict[Job, Ticket] = {}

    def submit(self, caller: int, tokens: Sequence[float]) -> Ticket:
        """A request has arrived. Its ticket is settled when it is answered."""
        ticket = Ticket(Job(caller, tokens), self._environment.event())
        if not self.up:
            ticket.settle(Outcome.LOST)
            return ticket
        self._tickets[ticket.job] = ticket
        self._environment.process(self._arrive(ticket, self._life))
        return ticket

    def kill(self) -> None:
        """Everything here is lost."""
        self.up = False
        self._life += 1
        lost, self._tickets = list(self._tickets.values()), {}
        self.engine = Engine(self.engine.batch_tokens, self.engine.max_queue_tokens)
        self._front = Station(self._environment)
        self.scoring = False
        for ticket in lost:
            ticket.settle(Outcome.LOST)

    def start(self) -> None:
        """Up again, empty."""
        self.up = True

    def _arrive(self, ticket: Ticket, life: int) -> "simpy.events.ProcessGenerator":
        work_s = self._times.request_s(len(ticket.job.tokens)) / self._speed
        if self.scoring and self._times.one_core:
            self._taken_s += work_s
        yield self._environment.timeout(self._front.delay_s(work_s))
        if life != self._life:
            return
        if not self.engine.admits(ticket.job):
            ticket.retry_after_s = self.engine.retry_after_s(ticket.job)
            del self._tickets[ticket.job]
            ticket.settle(Outcome.REFUSED)
            return
        self.engine.add(ticket.job)
        if not self.scoring:
            self.scoring = True
            self._environment.process(self._score(life))

    def _score(self, life: int) -> "simpy.events.ProcessGenerator":
        while True:
            batch, tokens, dropped = self.engine.take()
            for job in dropped:
                self._tickets.pop(job).settle(Outcome.DROPPED)
            if not batch:
                self.scoring = False
                return
            seconds = self._times.batch_s(tokens) / self._speed
            self._taken_s = 0.0
            yield self._environment.timeout(seconds)
            while life == self._life and self._taken_s:
                more_s, self._taken_s = self._taken_s, 0.0
                seconds += more_s
                yield self._environment.timeout(more_s)
            if life != self._life:
                return
            self.busy_s += seconds
            self.batches += 1
            self.batch_tokens += tokens
            for job in self.engine.finish(batch, tokens, seconds):
                self._tickets.pop(job).settle(Outcome.SCORED)
