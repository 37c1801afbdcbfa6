"""What `speed` concludes: whether a server's rewards are the model's, and how ours compares within each number format.

Failure modes: a server that computes something else is timed; int8 is compared with fp32.
"""

import math
import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FP32_MAX_DISTANCE = 1e-4
LOSSY_SHARE = 0.5
"""In other formats, the mean distance may be this share of the standard deviation of the model's rewards. Rewards of
other texts are 1.1 standard deviations off on average, and a constant 0.8."""


@dataclass(frozen=True)
class Difference:
    """Between a server's rewards and the model's: the largest and the mean absolute one."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Timing:
    """A server at one number of callers."""

    server: str
    number_format: str
    callers: int
    rps: float
    per_cpu_s: float
    """Requests for each second of the server's CPU time."""
    p50_s: float
    p95_s: float
    p99_s: float
    errors: int

    @property
    def ours(self) -> bool:
        return self.server.startswith("ours")


Speed = Callable[[Timing], float]


def difference_of(rewards: Sequence[float], expected: Sequence[float]) -> Difference:
    """Raises ValueError if they are not as many."""
    distances = [abs(got - wanted) for got, wanted in zip(rewards, expected, strict=True)]
    largest = math.nan if any(map(math.isnan, distances)) else max(distances)
    return Difference(largest, statistics.mean(distances))


def refusal_of(number_format: str, difference: Difference, expected: Sequence[float]) -> str:
    """Why a server with this difference is not timed; empty if it may be. NaN is refused."""
    if number_format == "fp32":
        if difference.largest <= FP32_MAX_DISTANCE:
            return ""
        return (
            f"a reward is {difference.largest:.1e} from the model's; in fp32 at most {FP32_MAX_DISTANCE:.0e} is allowed"
        )
    limit = LOSSY_SHARE * statistics.pstdev(expected)
    if difference.mean <= limit:
        return ""
    return (
        f"rewards are {difference.mean:.1e} from the model's on average; in {number_format} at most {limit:.1e} is "
        f"allowed, half the standard deviation of the model's"
    )


rps: Speed = operator.attrgetter("rps")
per_cpu_s: Speed = operator.attrgetter("per_cpu_s")


def best_other(timing: Timing, timings: Iterable[Timing], speed: Speed = rps) -> Timing | None:
    """The fastest server that is not ours, of the same format and number of callers."""
    alike = (timing.number_format, timing.callers)
    others = [each for each in timings if not each.ours and (each.number_format, each.callers) == alike]
    return max(others, key=speed, default=None)


def ratio(timing: Timing, timings: Iterable[Timing], speed: Speed = rps) -> float:
    """How many times as fast as the best other server; NaN without one."""
    best = best_other(timing, timings, speed)
    return speed(timing) / speed(best) if best else math.nan


def tables(timings: Sequence[Timing], differences: dict[str, Difference]) -> list[str]:
    """Two Markdown tables: each format's servers from fast to slow, and ours over the best other of the format."""
    callers = list(dict.fromkeys(each.callers for each in timings))
    counts = [f"{count} caller{'s' if count > 1 else ''}" for count in callers]
    formats = list(dict.fromkeys(each.number_format for each in timings if each.ours))
    most = callers[0]
    lines = [
        f"| format | server | {' | '.join(counts)} | p50, p95 at {most}, ms | largest, mean distance |",
        f"| --- | --- |{' --- |' * (len(callers) + 2)}",
    ]
    for number_format in formats:
        of_format = [each for each in timings if each.number_format == number_format]
        by_server = {
            name: [each for each in of_format if each.server == name] for name in {each.server for each in of_format}
        }
        for name, cells in sorted(by_server.items(), key=lambda item: -item[1][0].rps):
            speeds = " | ".join(f"{cell.rps:.1f}{f' ({cell.errors} errors)' if cell.errors else ''}" for cell in cells)
            first, apart = cells[0], differences[name]
            lines.append(
                f"| {number_format} | {name} | {speeds} | {first.p50_s * 1000:.0f}, {first.p95_s * 1000:.0f} "
                f"| {apart.largest:.0e}, {apart.mean:.0e} |"
            )
    lines += ["", f"| ours over the best other | {' | '.join(counts)} |", f"| --- |{' --- |' * len(callers)}"]
    for name in dict.fromkeys(each.server for each in timings if each.ours):
        cells = [each for each in timings if each.server == name]
        lines.append(f"| {name} | {' | '.join(_ratio_cell(cell, timings) for cell in cells)} |")
    return lines


def _ratio_cell(cell: Timing, timings: Sequence[Timing]) -> str:
    best = best_other(cell, timings)
    return f"{ratio(cell, timings):.2f} ({best.server})" if best else "no other"
