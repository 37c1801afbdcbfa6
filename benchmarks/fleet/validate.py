"""Predicted beside measured: the simulation at every measured point, with the service times measured beside it.

    python -m benchmarks.fleet.validate --table docs/evidence/fleet.md

Exits 1 when throughput or wait is more than 15 % off at a point. A wait also counts as right when it is less than
`--floor` of the trainers' time from the prediction: 15 % of nothing is nothing.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fleet.points import RESULTS
from benchmarks.fleet.results import read
from benchmarks.tables import put
from plaudit.sizing.fleet import Figures, FleetSettings, simulate
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload

WITHIN = 0.15


@dataclass(frozen=True)
class Compared:
    """One point, measured and predicted."""

    point: dict[str, Any]
    predicted: Figures
    floor: float

    @property
    def throughput_off(self) -> float:
        """By how much the predicted throughput is off, as a share of the measured one."""
        return self.predicted.texts_per_s / float(self.point["measured"]["texts_per_s"]) - 1

    @property
    def wait_off(self) -> float:
        """The same of the wait's share of the trainers' time; 0 if there is none to speak of."""
        measured = float(self.point["measured"]["wait_share"])
        if max(measured, self.predicted.wait_share) < 1e-3:
            return 0.0
        return self.predicted.wait_share / max(measured, 1e-9) - 1

    @property
    def right(self) -> bool:
        apart = abs(self.predicted.wait_share - float(self.point["measured"]["wait_share"]))
        return abs(self.throughput_off) <= WITHIN and (abs(self.wait_off) <= WITHIN or apart < self.floor)

    def row(self) -> str:
        measured = self.point["measured"]
        cells = [
            self.point["model"]["kind"],
            self.point["trainers"],
            self.point["replicas"],
            f"{measured['texts_per_s']:.0f}",
            f"{self.predicted.texts_per_s:.0f}",
            f"{self.throughput_off:+.0%}",
            f"{measured['wait_share']:.1%}",
            f"{self.predicted.wait_share:.1%}",
            f"{self.wait_off:+.0%}",
            f"{measured['latency_p99_s'] * 1000:.0f}",
            f"{self.predicted.latency_p99_s * 1000:.0f}",
        ]
        return f"| {' | '.join(map(str, cells))} |"


HEAD = [
    "| model | trainers | replicas | texts/s | predicted | off | wait | predicted | off | p99, ms | predicted |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def predicted(point: dict[str, Any]) -> Figures:
    """The simulation of a measured point: the same workload, random numbers, warm-up and measurement."""
    settings = FleetSettings(
        Workload(**point["workload"]),
        dataclasses.replace(ServiceTimes.from_json(point["times"]), one_core=point["model"]["kind"] == "judge"),
        trainers=point["trainers"],
        replicas=point["replicas"],
        batch_tokens=point["batch_tokens"],
        max_queue_tokens=point["max_queue_tokens"],
    )
    return simulate(settings, warm_up_s=point["measured"]["warm_up_s"], seconds=point["measured"]["seconds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=RESULTS / "points")
    parser.add_argument("--only", default="", help="points whose model's kind this is")
    parser.add_argument("--floor", type=float, default=0.003)
    parser.add_argument("--table", type=Path, help="document whose table is replaced")
    arguments = parser.parse_args()
    points = [point for point in read(arguments.points) if arguments.only in point["model"]["kind"]]
    compared = [Compared(point, predicted(point), arguments.floor) for point in points]
    lines = HEAD + [one.row() for one in compared]
    print("\n".join(lines))
    print(f"{sum(one.right for one in compared)} of {len(compared)} points within {WITHIN:.0%}")
    if arguments.table is not None:
        put(arguments.table, "fleet validation", lines)
    return 0 if all(one.right for one in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
