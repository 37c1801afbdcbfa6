"""Trainers against replicas behind the balancer: throughput, wait, latency, refusals, fairness, memory, connections.

    python -m benchmarks.fleet.points --model sleep --batch-s 0.02 --token-s 0.00002 --trainers 1 16 64 --replicas 1 2 4
    python -m benchmarks.fleet.points --model judge --trainers 1 4 16 --replicas 1 2

Each point is a JSON file in `--out`; a point that is there is not measured again (`--again` does). The service's times
are measured before the points, within a minute or two of each, and stand in each file for
`benchmarks.fleet.validate`. `--run` is the directory of a PPO run, whose steps the trainers repeat; `--stretch 10`
makes them ten times as long, as a larger policy would. A point with N trainers is stretched so that they send at most
`--most-requests` requests a second, and the file says how far.
"""

import argparse
import asyncio
import math
import os
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fleet.calibrate import calibrated
from benchmarks.fleet.results import write
from benchmarks.fleet.testbed import Fleet, Model, fleet
from benchmarks.fleet.trainers import Seen, run_trainers
from harness.machine.balancer import CONFIG
from plaudit.sizing.workload import Workload, from_run

RESULTS = Path(__file__).parent / "results"
DEMO = RESULTS / "demo-run"
"""metrics.jsonl and run.json of `plaudit demo`."""
STEPS = 3
"""Steps of each trainer in a measurement, about, at least."""
STEPS_OF_ALL = 60
"""Steps of all trainers together, about: with a few steps, one that met another's burst would decide."""
SHORTEST_S, LONGEST_S = 8.0, 45.0
CALIBRATED_FOR_S = 60.0
"""Measured service times are used for points that begin within this time."""


class Watch:
    """Memory, connections and CPU of the fleet while trainers run, sampled every second."""

    def __init__(self, watched: Fleet) -> None:
        self._processes = watched.processes() | {"trainers": psutil.Process()}
        self._fleet = watched
        self.memory_mib: dict[str, float] = {}
        self.connections: dict[str, int] = {}
        self.waiting_in_balancer = 0
        self._begun: dict[str, float] = {}
        self._at = 0.0

    def start(self, seen: Seen) -> "asyncio.Task[None]":
        self._at = time.monotonic()
        self._begun = {name: _cpu_s(process) for name, process in self._processes.items()}
        return asyncio.create_task(self._sample(seen))

    async def _sample(self, seen: Seen) -> None:
        while seen.end == float("inf"):
            await asyncio.sleep(1.0)
            for name, process in self._processes.items():
                self.memory_mib[name] = max(self.memory_mib.get(name, 0.0), process.memory_info().rss / 2**20)
                # The files of /proc/PID/fd: asking for each connection's state would cost a hundred times as much.
                self.connections[name] = max(self.connections.get(name, 0), process.num_fds())
            rows = await asyncio.to_thread(self._fleet.statistics)
            waiting = sum(int(row["qcur"] or 0) for row in rows if row["svname"] == "BACKEND")
            self.waiting_in_balancer = max(self.waiting_in_balancer, waiting)
        seconds = time.monotonic() - self._at
        self.cpu_share = {
            name: (_cpu_s(process) - self._begun[name]) / seconds for name, process in self._processes.items()
        }

    def figures(self) -> dict[str, Any]:
        return {
            "memory_mib": {name: round(value, 1) for name, value in self.memory_mib.items()},
            "open_files": self.connections,
            "waiting_in_balancer": self.waiting_in_balancer,
            "cpu_share": {name: round(value, 3) for name, value in self.cpu_share.items()},
        }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def measured_point(running: Fleet, workload: Workload, trainers: int, **more: Any) -> dict[str, Any]:
    """One point of trainers against a running fleet."""
    watch = Watch(running)
    steps = max(STEPS, STEPS_OF_ALL / trainers)
    seconds = min(LONGEST_S, max(SHORTEST_S, steps * workload.step_s))
    warm_up_s = min(LONGEST_S, 1.2 * workload.step_s)
    seen = asyncio.run(
        run_trainers(
            [running.url],
            running.keys[:trainers],
            workload,
            warm_up_s=warm_up_s,
            seconds=seconds,
            during=watch.start,
            **more,
        )
    )
    return {
        **seen.figures(trainers),
        "seconds": seconds,
        "warm_up_s": warm_up_s,
        "statuses": dict(seen.statuses),
        "stopped": len(seen.stopped),
        **watch.figures(),
    }


def measured(arguments: argparse.Namespace) -> None:
    model = Model(arguments.model, arguments.batch_s, arguments.token_s)
    base = from_run(arguments.run).stretched(arguments.stretch)
    for replicas in arguments.replicas:
        wanted = [
            trainers
            for trainers in arguments.trainers
            if arguments.again or not _file(arguments, trainers, replicas).exists()
        ]
        if not wanted:
            continue
        with fleet(
            model, replicas, trainers=max(wanted), flags=arguments.service, config=arguments.balancer_config
        ) as running:
            calibrated_at = -math.inf
            for trainers in wanted:
                if time.monotonic() > calibrated_at + CALIBRATED_FOR_S:
                    times = calibrated(running, base.request_texts, base.tokens_per_text)
                    calibrated_at = time.monotonic()
                slowest = trainers * base.requests_per_step / base.step_s / arguments.most_requests
                workload = base.stretched(max(1.0, slowest))
                load = os.getloadavg()[0]
                found = measured_point(running, workload, trainers)
                point = {
                    "model": vars(model),
                    "trainers": trainers,
                    "replicas": replicas,
                    "batch_tokens": 1024,
                    "max_queue_tokens": 65_536,
                    "workload": vars(workload),
                    "times": times.to_json(),
                    "load_average": [load, os.getloadavg()[0]],
                    "measured": found,
                }
                write(_file(arguments, trainers, replicas), point)
                print(
                    f"{model.kind} {trainers} trainers, {replicas} replicas: {found['texts_per_s']:.0f} texts/s, "
                    f"waits {found['wait_share']:.1%}, p99 {found['latency_p99_s'] * 1000:.0f} ms, "
                    f"{found['refused']} refused, shares {found['share_smallest']:.2f} to {found['share_largest']:.2f}",
                    flush=True,
                )


def _file(arguments: argparse.Namespace, trainers: int, replicas: int) -> Path:
    name = f"{arguments.name or arguments.model}-{trainers:03d}-trainers-{replicas}-replicas.json"
    return Path(arguments.out) / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["judge", "sleep", "null"], default="sleep")
    parser.add_argument("--batch-s", type=float, default=0.02)
    parser.add_argument("--token-s", type=float, default=2e-5)
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--run", type=Path, default=DEMO)
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--most-requests", type=float, default=100.0, help="requests a second of all trainers")
    parser.add_argument("--name", help="first part of the files' names; the model's kind if not given")
    parser.add_argument("--out", type=Path, default=RESULTS / "points")
    parser.add_argument("--balancer-config", type=Path, default=CONFIG)
    parser.add_argument("--again", action="store_true")
    parser.add_argument(
        "--service", nargs="*", default=[], help="more flags of the services, such as -- --batch-tokens"
    )
    measured(parser.parse_args())


if __name__ == "__main__":
    main()
