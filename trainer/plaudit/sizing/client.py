"""A simulated trainer and its reward client: bursts, retries, backoff and hedging as `plaudit.rewards.source` has them.

Failure modes: retries that the real client would not make; a wait that ends before the last reward.
"""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from plaudit.sizing.replica import Outcome, Station
from plaudit.sizing.workload import Draws, Workload

WAIT_INITIAL_S, WAIT_MAX_S, WAIT_JITTER_S, ASIDE_MAX_S = 0.1, 5.0, 0.5, 30.0
"""The client's backoff (plaudit.rewards.source)."""

Route = Callable[[int, Sequence[float]], Generator[simpy.Event, Any, tuple[Outcome, float]]]
"""Sends a request of a trainer's to where an endpoint leads: what became of it, and Retry-After."""


@dataclass(slots=True)
class Endpoint:
    """One URL, as one trainer sees it."""

    route: Route
    outstanding: int = 0
    failures: int = 0
    aside_until: float = 0.0


@dataclass
class Seen:
    """What the trainers saw: the same records as the benchmarks' trainers keep."""

    waits: list[tuple[int, float, float]] = field(default_factory=list)
    """Trainer, begin and end of each wait for rewards."""
    answers: list[tuple[int, float, float, int]] = field(default_factory=list)
    """Trainer, when sent, when answered, texts; retries included."""
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    """Trainer, end of the step, seconds waited in it."""
    refusals: list[float] = field(default_factory=list)
    """When a request was refused with 429."""
    losses: list[float] = field(default_factory=list)
    """When a request got no answer, or 503."""
    sent: int = 0
    """Requests, however often they were tried."""
    hedges: int = 0


class Client:
    """One trainer. `run` is its process."""

    def __init__(
        self,
        environment: simpy.Environment,
        number: int,
        workload: Workload,
        routes: Sequence[Route],
        seen: Seen,
        *,
        station: Station,
        client_s: float,
        delay_s: float,
        timeout_s: float,
        hedge_after_s: float | None,
        seed: int,
    ) -> None:
        self._environment = environment
        self._number = number
        self._workload = workload
        self._endpoints = [Endpoint(route) for route in routes]
        self._seen = seen
        self._station = station
        self._client_s = client_s
        self._delay_s = delay_s
        self._timeout_s = timeout_s
        self._hedge_after_s = hedge_after_s
        self._hedging = False
        self._random = random.Random(seed * 1_000_003 + number)
        self._draws = Draws(workload, number, seed)
        self._in_flight = simpy.Resource(environment, workload.in_flight * len(routes))
        self._retries = simpy.Resource(environment, len(routes))

    def run(self) -> "simpy.events.ProcessGenerator":
        """Steps without end, the first one from a random moment of a step on."""
        workload, environment = self._workload, self._environment
        yield environment.timeout(self._draws.first_pause_s)
        while True:
            pending: list[simpy.Event] = []
            text = 0
            for chunk in workload.chunks:
                yield environment.timeout(self._draws.jittered(workload.generate_s))
                for texts in chunk:
                    pending.append(environment.process(self._ask(self._draws.tokens[text : text + texts])))
                    text += texts
                yield environment.timeout(self._draws.jittered(workload.evaluate_s))
            began = environment.now
            yield environment.all_of(pending)
            self._seen.waits.append((self._number, began, environment.now))
            waited_s = environment.now - began
            yield environment.timeout(self._draws.jittered(workload.update_s))
            self._seen.steps.append((self._number, environment.now, waited_s))

    def _ask(self, tokens: Sequence[float]) -> "simpy.events.ProcessGenerator":
        """One request, tried until it is scored."""
        sent = self._environment.now
        self._seen.sent += 1
        with self._in_flight.request() as place:
            yield place
            tries = 0
            while True:
                tries += 1
                if tries == 1:
                    outcome, retry_after_s = yield from self._attempt(tokens)
                else:
                    with self._retries.request() as turn:
                        yield turn
                        outcome, retry_after_s = yield from self._attempt(tokens)
                if outcome is Outcome.SCORED:
                    break
                yield self._environment.timeout(self._pause_s(tries, retry_after_s))
        self._seen.answers.append((self._number, sent, self._environment.now, len(tokens)))

    def _pause_s(self, tries: int, retry_after_s: float) -> float:
        if any(endpoint.failures == 0 for endpoint in self._endpoints):
            return 0.0
        jitter = self._random.uniform(0, WAIT_JITTER_S)
        if retry_after_s:
            return retry_after_s + jitter
        return float(min(WAIT_MAX_S, WAIT_INITIAL_S * 2 ** (tries - 1) + jitter))

    def _attempt(self, tokens: Sequence[float]) -> Generator[simpy.Event, Any, tuple[Outcome, float]]:
        first = self._choose()
        if self._hedge_after_s is None or len(self._endpoints) == 1:
            return (yield from self._send(first, tokens))
        environment = self._environment
        asked: list[simpy.Process] = [environment.process(self._send(first, tokens))]
        yield environment.any_of([asked[0], environment.timeout(self._hedge_after_s)])
        others = [e for e in self._endpoints if e is not first and e.failures == 0]
        if not asked[0].triggered and others and not self._hedging:
            self._hedging = True
            self._seen.hedges += 1
            asked.append(environment.process(self._send(min(others, key=lambda e: e.outstanding), tokens)))
            yield environment.any_of(asked)
            self._hedging = False
            done = [process for process in asked if process.triggered]
            if len(done) == 1 and _result(done[0])[0] is not Outcome.SCORED:
                yield environment.all_of(asked)
        else:
            yield asked[0]
        results = [_result(process) for process in asked if process.triggered]
        for process in asked:
            if not process.triggered:
                process.interrupt()
        scored = [result for result in results if result[0] is Outcome.SCORED]
        return (scored or results)[0]

    def _choose(self) -> Endpoint:
        now = self._environment.now
        fit = [e for e in self._endpoints if e.aside_until <= now and not (e.failures and e.outstanding)]
        return min(fit or self._endpoints, key=lambda endpoint: (endpoint.outstanding, endpoint.aside_until))

    def _send(self, endpoint: Endpoint, tokens: Sequence[float]) -> Generator[simpy.Event, Any, tuple[Outcome, float]]:
        environment = self._environment
        endpoint.outstanding += 1
        sending = None
        try:
            under_way_s = self._delay_s / 2
            if self._client_s:
                under_way_s += self._station.delay_s(self._client_s / 2)
            if under_way_s:
                yield environment.timeout(under_way_s)
            sending = environment.process(endpoint.route(self._number, tokens))
            yield environment.any_of([sending, environment.timeout(self._timeout_s)])
            if not sending.triggered:
                sending.interrupt()
                outcome, retry_after_s = Outcome.LOST, 0.0
            else:
                outcome, retry_after_s = _result(sending)
            under_way_s = self._delay_s / 2
            if self._client_s:
                under_way_s += self._station.delay_s(self._client_s / 2)
            if under_way_s:
                yield environment.timeout(under_way_s)
        except simpy.Interrupt:
            if sending is not None and sending.is_alive:
                sending.interrupt()
            return Outcome.DROPPED, 0.0
        finally:
            endpoint.outstanding -= 1
        if outcome is Outcome.SCORED:
            endpoint.failures, endpoint.aside_until = 0, 0.0
        else:
            (self._seen.refusals if outcome is Outcome.REFUSED else self._seen.losses).append(environment.now)
            endpoint.failures += 1
            pause_s = min(ASIDE_MAX_S, WAIT_INITIAL_S * 2.0 ** min(endpoint.failures, 20))
            endpoint.aside_until = environment.now + max(pause_s, retry_after_s)
        return outcome, retry_after_s


def _result(process: simpy.Process) -> tuple[Outcome, float]:
    """What a process of `_send` or of a route has returned."""
    assert process.value is not None
    outcome, retry_after_s = process.value
    return outcome, retry_after_s
