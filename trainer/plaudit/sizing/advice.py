"""How many replicas a number of trainers needs, and the settings that go with it: what `plaudit size` says.

Failure modes: advice for a steady state that a burst or one lost replica breaks; an answer that takes minutes.
"""

import dataclasses
import math
from dataclasses import dataclass

from plaudit.errors import ConfigError
from plaudit.sizing.fleet import Figures, FleetSettings, simulate
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload

MOST_SIMULATED = 200
"""Trainers that are simulated. More are taken as so many times a smaller fleet, whose wait is a little longer: a large
pool of replicas evens bursts out better."""
REQUESTS = 6_000
"""Requests that one simulation takes at most, about."""
BATCH_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16_384)
MOST_LOAD = 0.95
"""Share of a replica's time that the trainers may ask for. A queue that builds up over hours is not simulated."""
WORTH_IT = 0.95
"""A larger batch is advised only if it shortens the time of a token below this share."""
MOST_QUEUE_S = 30.0
"""A full queue may hold work for so long: half of the trainer's request timeout."""
LEAST_QUEUE_TOKENS = 65_536
"""The service's default, which is raised and not lowered where a queue of it takes less than a second."""


@dataclass(frozen=True)
class Point:
    """One number of replicas and what it gives."""

    replicas: int
    figures: Figures


@dataclass(frozen=True)
class Advice:
    """What to set, and what the wait will be."""

    workload: Workload
    trainers: int
    target_share: float
    replicas: int
    batch_tokens: int
    max_queue_tokens: int
    grace_s: int
    """Seconds that SIGTERM leaves a replica: a full queue is answered in it."""
    queue_items_target: int
    """For an autoscaler: texts in a replica's queue, averaged over time, at the advised number (Little's law)."""
    requests_target: float
    """The same in requests in progress."""
    load: float
    """Share of the time that the trainers would keep one replica busy, without any wait."""
    points: tuple[Point, ...]
    """The curve, by replicas."""
    one_down: Figures
    """With one replica fewer than advised; with one in all, while it is away there are no rewards."""

    @property
    def chosen(self) -> Figures:
        """The figures of the advised number of replicas."""
        return next(point.figures for point in self.points if point.replicas == self.replicas)


def advise(workload: Workload, times: ServiceTimes, trainers: int, target_share: float, *, most: int = 1024) -> Advice:
    """The fewest replicas that keep the wait below `target_share` of a step, and settings that fit them.

    Raises:
        ConfigError: no number of replicas up to `most` does it.
    """
    batch_tokens = best_batch_tokens(times, workload)
    rate = times.tokens_per_s(batch_tokens, workload.tokens_per_text, workload.request_texts)
    load = trainers * workload.tokens_per_step / workload.step_s / rate
    known: dict[int, Figures] = {}
    settings = FleetSettings(workload, times, trainers=trainers, batch_tokens=batch_tokens, max_queue_tokens=2**40)

    def figures(replicas: int) -> Figures:
        if replicas not in known:
            known[replicas] = simulated(dataclasses.replace(settings, replicas=replicas))
        return known[replicas]

    # No fleet waits less than a single trainer whose requests all have a replica of their own.
    alone = dataclasses.replace(settings, trainers=1, replicas=workload.requests_per_step)
    best = simulated(alone).wait_share
    if best > target_share:
        raise ConfigError(
            f"no number of replicas keeps the wait below {target_share:.1%} of a step: a single trainer with a replica "
            f"for each request waits {best:.1%}. A faster judge (more threads, int8, a GPU) or smaller requests "
            "(reward.chunk_size) shorten it"
        )
    high = max(1, math.ceil(load / MOST_LOAD))
    low = high - 1
    while figures(high).wait_share > target_share:
        low = high
        if high >= most:
            raise ConfigError(
                f"{most} replicas do not keep the wait below {target_share:.1%} of a step; with fewer trainers in a "
                "fleet of their own they would"
            )
        high = min(most, max(high + 1, math.ceil(high * 1.2)))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if figures(middle).wait_share <= target_share else (middle, high)
    for beside in {max(1, high // 2), max(1, high - 1), high + 1, math.ceil(high * 1.5)}:
        figures(beside)
    queue = queue_tokens(rate, workload, trainers, high)
    found = known[high]
    in_progress = found.requests_per_s * found.latency_mean_s / high
    return Advice(
        workload=workload,
        trainers=trainers,
        target_share=target_share,
        replicas=high,
        batch_tokens=batch_tokens,
        max_queue_tokens=queue,
        grace_s=max(30, 5 * math.ceil((queue / rate + 5) / 5)),
        queue_items_target=max(1, math.ceil(in_progress * workload.texts_per_step / workload.requests_per_step)),
        requests_target=max(0.1, round(in_progress, 1)),
        load=load,
        points=tuple(Point(replicas, known[replicas]) for replicas in sorted(known)),
        one_down=known[max(1, high - 1)],
    )


def simulated(settings: FleetSettings) -> Figures:
    """`simulate` with as many steps as fit into `REQUESTS`, and a smaller fleet for many trainers."""
    times = settings.trainers / MOST_SIMULATED
    if times > 1 and settings.replicas >= 8 * times:
        settings = dataclasses.replace(
            settings, trainers=MOST_SIMULATED, replicas=max(1, math.floor(settings.replicas / times))
        )
    step_s = settings.workload.step_s
    a_step = settings.trainers * settings.workload.requests_per_step
    steps = min(30.0, max(3.0, REQUESTS / a_step))
    return simulate(settings, warm_up_s=2 * step_s, seconds=steps * step_s)


def best_batch_tokens(times: ServiceTimes, workload: Workload) -> int:
    """The smallest batch whose tokens take little longer than those of a larger one, which would only add latency.

    At most twice the largest batch of the table: beyond it nothing was measured.
    """
    best = BATCH_TOKENS[0]
    for tokens in BATCH_TOKENS[1:]:
        if tokens > 2 * times.table[-1][0]:
            break
        if best >= workload.tokens_per_text and times.batch_s(tokens) / tokens > WORTH_IT * times.batch_s(best) / best:
            break
        best = tokens
    return best


def queue_tokens(rate: float, workload: Workload, trainers: int, replicas: int) -> int:
    """A queue's bound: twice a replica's share of all trainers' bursts, but no more work than half a timeout."""
    burst = 2 * trainers * workload.tokens_per_step / replicas
    wanted = max(LEAST_QUEUE_TOKENS, 2 ** math.ceil(math.log2(burst)))
    most = 2 ** math.floor(math.log2(max(1.0, MOST_QUEUE_S * rate)))
    return int(max(workload.tokens_per_step // workload.requests_per_step, min(wanted, most)))
