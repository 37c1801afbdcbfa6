"""A simulated fleet: trainers, a balancer, replicas that fail and are added, by events in virtual time (simpy).

`simulate` runs it and gives the figures that the benchmarks measure of a real fleet (benchmarks/fleet), under the same
names. What it leaves out: the network's bandwidth, and CPUs that replicas share.

Failure modes: figures from before the fleet is in its steady state; requests that vanish.
"""

import itertools
import random
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from plaudit.checks import positive
from plaudit.sizing.autoscaling import Autoscaler, Signal
from plaudit.sizing.client import Client, Route, Seen
from plaudit.sizing.replica import Outcome, Replica, Station
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload

BALANCER_RETRIES = 3
"""`retries` in deploy/balancer/haproxy.cfg."""


@dataclass(frozen=True)
class FleetSettings:
    """What is simulated."""

    workload: Workload
    times: ServiceTimes
    trainers: int = 1
    replicas: int = 1
    batch_tokens: int = 1024
    max_queue_tokens: int = 65_536
    balancer: bool = True
    """One URL that leads to the replica with the fewest requests; off: each trainer has all URLs and chooses itself."""
    balancer_s: float = 0.0
    """Seconds of the balancer for a request, one after the other: what it can pass on in a second is the inverse."""
    hedge_after_s: float | None = None
    request_timeout_s: float = 60.0
    speeds: Mapping[int, float] = field(default_factory=dict)
    """Replicas that are slower or faster than the table, by number."""
    failure_every_s: float | None = None
    """A replica, any, dies on average this often."""
    restart_s: float = 30.0
    """Until a replica that died, or is added, takes requests: start of the process, loading, checks, health check."""
    autoscaler: Autoscaler | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "trainers", "replicas", "batch_tokens", "max_queue_tokens", "failure_every_s", "hedge_after_s")


class Fleet:
    """The running simulation."""

    def __init__(self, settings: FleetSettings) -> None:
        self.environment = simpy.Environment()
        self.seen = Seen()
        self.settings = settings
        self.replicas: list[Replica] = []
        self.failures = 0
        self.sizes: list[tuple[float, int]] = []
        """When the number of replicas changed, and to what."""
        self._random = random.Random(settings.seed)
        self._turn = itertools.count()
        self._balancer = Station(self.environment)
        for number in range(settings.replicas):
            self._new_replica(settings.speeds.get(number, 1.0))
        routes: list[Route] = (
            [self._through_balancer] if settings.balancer else [_directly_to(replica) for replica in self.replicas]
        )
        shared = Station(self.environment)
        for number in range(settings.trainers):
            client = Client(
                self.environment,
                number,
                settings.workload,
                routes,
                self.seen,
                station=shared,
                client_s=settings.times.client_s,
                delay_s=settings.times.delay_s,
                timeout_s=settings.request_timeout_s,
                hedge_after_s=settings.hedge_after_s,
                seed=settings.seed,
            )
            self.environment.process(client.run())
        if settings.failure_every_s is not None:
            self.environment.process(self._fail())
        if settings.autoscaler is not None:
            self.environment.process(self._scale(settings.autoscaler))

    def _new_replica(self, speed: float = 1.0) -> Replica:
        settings = self.settings
        replica = Replica(
            self.environment,
            settings.times,
            batch_tokens=settings.batch_tokens,
            max_queue_tokens=settings.max_queue_tokens,
            speed=speed,
        )
        self.replicas.append(replica)
        self.sizes.append((self.environment.now, len(self.replicas)))
        return replica

    def _through_balancer(
        self, caller: int, tokens: Sequence[float]
    ) -> Generator[simpy.Event, Any, tuple[Outcome, float]]:
        if self.settings.balancer_s:
            yield self.environment.timeout(self._balancer.delay_s(self.settings.balancer_s))
        for _ in range(1 + BALANCER_RETRIES):
            up = [replica for replica in self.replicas if replica.up]
            if not up:
                break
            # Among equals the next one in turn.
            fewest = min(replica.in_progress for replica in up)
            equal = [replica for replica in up if replica.in_progress == fewest]
            outcome, retry_after_s = yield from _at(equal[next(self._turn) % len(equal)], caller, tokens)
            if outcome is not Outcome.LOST:
                return outcome, retry_after_s
        yield self.environment.timeout(0)
        return Outcome.LOST, 0.0

    def _fail(self) -> "simpy.events.ProcessGenerator":
        assert self.settings.failure_every_s is not None
        while True:
            yield self.environment.timeout(self._random.expovariate(1 / self.settings.failure_every_s))
            up = [replica for replica in self.replicas if replica.up]
            if up:
                victim = self._random.choice(up)
                self.failures += 1
                victim.kill()
                self.environment.process(self._restart(victim))

    def _restart(self, replica: Replica) -> "simpy.events.ProcessGenerator":
        yield self.environment.timeout(self.settings.restart_s)
        replica.start()

    def _scale(self, autoscaler: Autoscaler) -> "simpy.events.ProcessGenerator":
        history: list[tuple[float, Signal]] = []
        wanted: list[tuple[float, int]] = []
        while True:
            yield self.environment.timeout(autoscaler.sample_s)
            now = self.environment.now
            up = [replica for replica in self.replicas if replica.up]
            history.append((now, Signal.of(up)))
            history = [(at, signal) for at, signal in history if at > now - autoscaler.window_s]
            if round(now / autoscaler.sample_s) % max(1, round(autoscaler.period_s / autoscaler.sample_s)):
                continue
            count = autoscaler.wanted([signal for _, signal in history], len(self.replicas))
            wanted = [(at, number) for at, number in wanted if at > now - autoscaler.down_after_s] + [(now, count)]
            if count > len(self.replicas):
                for _ in range(count - len(self.replicas)):
                    replica = self._new_replica()
                    replica.up = False
                    self.environment.process(self._restart(replica))
            else:
                # Down only to the most that was wanted for a while.
                keep = max(number for _, number in wanted)
                while len(self.replicas) > keep and self._remove_one():
                    self.sizes.append((now, len(self.replicas)))

    def _remove_one(self) -> bool:
        """Takes an idle replica away; one with requests in progress drains first and goes a later time."""
        idle = [replica for replica in self.replicas if replica.up and replica.in_progress == 0]
        if not idle:
            return False
        self.replicas.remove(idle[-1])
        return True


def _at(replica: Replica, caller: int, tokens: Sequence[float]) -> Generator[simpy.Event, Any, tuple[Outcome, float]]:
    """A request at one replica. An interrupt is the client's disconnect."""
    replica.in_progress += 1
    ticket = replica.submit(caller, tokens)
    try:
        outcome: Outcome = yield ticket.done
    except simpy.Interrupt:
        ticket.job.abandoned = True
        return Outcome.DROPPED, 0.0
    finally:
        replica.in_progress -= 1
    return outcome, ticket.retry_after_s


def _directly_to(replica: Replica) -> Route:
    def route(caller: int, tokens: Sequence[float]) -> Generator[simpy.Event, Any, tuple[Outcome, float]]:
        return (yield from _at(replica, caller, tokens))

    return route


@dataclass(frozen=True)
class Figures:
    """What a fleet did between two moments."""

    texts_per_s: float
    requests_per_s: float
    wait_share: float
    """Share of the trainers' time that they waited for rewards."""
    wait_s: float
    """Seconds of wait in a step, on average."""
    steps: int
    latency_mean_s: float
    latency_p50_s: float
    latency_p99_s: float
    share_largest: float
    """Texts of the trainer with the most, as a multiple of the mean."""
    share_smallest: float
    refused: int
    lost: int
    hedges: int
    utilisation: float
    """Share of the time that a replica's model ran, on average over replicas."""
    tokens_per_batch: float
    replicas_mean: float
    failures: int


def simulate(settings: FleetSettings, *, warm_up_s: float | None = None, seconds: float | None = None) -> Figures:
    """The fleet's figures over `seconds`, after `warm_up_s`; by default 3 steps and 10 steps."""
    step_s = settings.workload.step_s
    begin = 3 * step_s if warm_up_s is None else warm_up_s
    end = begin + (10 * step_s if seconds is None else seconds)
    fleet = Fleet(settings)
    if begin:
        fleet.environment.run(until=begin)
    busy = sum(replica.busy_s for replica in fleet.replicas)
    batches = sum(replica.batches for replica in fleet.replicas)
    batch_tokens = sum(replica.batch_tokens for replica in fleet.replicas)
    hedges = fleet.seen.hedges
    # Waits that have not ended at `end` count with their part: run on until every trainer has ended the one it is in.
    fleet.environment.run(until=end)
    measured = {
        "busy": sum(replica.busy_s for replica in fleet.replicas) - busy,
        "batches": sum(replica.batches for replica in fleet.replicas) - batches,
        "batch_tokens": sum(replica.batch_tokens for replica in fleet.replicas) - batch_tokens,
        "hedges": fleet.seen.hedges - hedges,
        "failures": fleet.failures,
    }
    sizes = mean_size(fleet.sizes, begin, end)
    limit = end + max(10 * step_s, 600.0)
    while fleet.environment.now < limit and not _all_past(fleet.seen.waits, settings.trainers, end):
        fleet.environment.run(until=fleet.environment.now + step_s)
    return _figures(fleet.seen, settings.trainers, begin, end, measured, sizes)


def _all_past(waits: Sequence[tuple[int, float, float]], trainers: int, end: float) -> bool:
    return len({trainer for trainer, _, ended in reversed(waits) if ended >= end}) == trainers


def mean_size(sizes: Sequence[tuple[float, int]], begin: float, end: float) -> float:
    """The mean number of replicas between two moments."""
    total = 0.0
    for (at, size), (until, _) in itertools.pairwise([*sizes, (end, 0)]):
        total += size * max(0.0, min(until, end) - max(at, begin))
    return total / (end - begin)


def _figures(
    seen: Seen, trainers: int, begin: float, end: float, measured: Mapping[str, float], replicas: float
) -> Figures:
    seconds = end - begin
    waited = sum(max(0.0, min(until, end) - max(since, begin)) for _, since, until in seen.waits)
    answered = [answer for answer in seen.answers if begin <= answer[2] < end]
    latencies = sorted(done - sent for _, sent, done, _ in answered)
    texts: Counter[int] = Counter()
    for trainer, _, _, count in answered:
        texts[trainer] += count
    shares = [texts[trainer] for trainer in range(trainers)]
    mean = sum(shares) / trainers or 1.0
    steps = [step for step in seen.steps if begin <= step[1] < end]

    def quantile(share: float) -> float:
        return latencies[min(len(latencies) - 1, int(share * len(latencies)))] if latencies else 0.0

    return Figures(
        texts_per_s=sum(shares) / seconds,
        requests_per_s=len(answered) / seconds,
        wait_share=waited / seconds / trainers,
        wait_s=sum(step[2] for step in steps) / max(1, len(steps)),
        steps=len(steps),
        latency_mean_s=sum(latencies) / max(1, len(latencies)),
        latency_p50_s=quantile(0.5),
        latency_p99_s=quantile(0.99),
        share_largest=max(shares) / mean,
        share_smallest=min(shares) / mean,
        refused=sum(begin <= at < end for at in seen.refusals),
        lost=sum(begin <= at < end for at in seen.losses),
        hedges=int(measured["hedges"]),
        utilisation=measured["busy"] / seconds / replicas,
        tokens_per_batch=measured["batch_tokens"] / max(1.0, measured["batches"]),
        replicas_mean=replicas,
        failures=int(measured["failures"]),
    )
