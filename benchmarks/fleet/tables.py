"""Tables of the simulation: replicas for a wait under 2 %, one more, failures, hedging, autoscaling.

    python -m benchmarks.fleet.tables --table docs/evidence/fleet.md

Writes each table into the document, and its numbers to `results/tables`. A few minutes on one core.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fleet.points import DEMO, RESULTS
from benchmarks.fleet.results import write
from benchmarks.tables import put
from plaudit.errors import ConfigError
from plaudit.sizing.advice import advise, best_batch_tokens
from plaudit.sizing.autoscaling import Autoscaler
from plaudit.sizing.fleet import FleetSettings, simulate
from plaudit.sizing.judges import JUDGES
from plaudit.sizing.service_times import ServiceTimes
from plaudit.sizing.workload import Workload, from_run

TARGET = 0.02
JUDGE_7B = ServiceTimes(((512.0, 0.06), (16_384.0, 1.2)), front_s=0.0005, front_text_s=4e-4)
"""Assumed: 13,700 tokens a second in batches of 16,384, a fifth of an H100's bf16 peak at 14 GFLOP a token."""

SHORT = {"texts_per_step": 128, "chunk_texts": 128, "tokens_per_text": 17.0, "spread": 0.1}
PROFILES: dict[str, tuple[Workload, ServiceTimes]] = {
    "the demo on two cores; the embedded judge, a core": (from_run(DEMO), JUDGES["imdb-distilbert-mini"]),
    "GPT-2 on two cores, step of 22 s; DistilBERT-base, a core": (
        Workload(generate_s=3.34, evaluate_s=4.24, update_s=14.62, **SHORT),  # type: ignore[arg-type]
        JUDGES["distilbert-base"],
    ),
    "GPT-2 on an H100, step of 0.13 s; DistilBERT-base, an H100": (
        # Requests of 8 texts: the front end takes 4 ms for 32, and four such requests are more than evaluation hides.
        Workload(generate_s=0.04, evaluate_s=0.011, update_s=0.078, request_texts=8, **SHORT),  # type: ignore[arg-type]
        JUDGES["distilbert-base-h100"],
    ),
    "7B on GPUs, step of 60 s (assumed); 7B judge, a GPU (assumed)": (
        Workload(
            generate_s=5.0,
            evaluate_s=1.5,
            update_s=34.0,
            texts_per_step=512,
            chunk_texts=128,
            tokens_per_text=600.0,
            spread=0.1,
        ),
        JUDGE_7B,
    ),
}
CPU = list(PROFILES)[1]


def replicas_needed(trainers: list[int]) -> tuple[list[str], Any]:
    """For each profile and number of trainers the fewest replicas, and what they are busy."""
    rows, kept = [], []
    for name, (workload, times) in PROFILES.items():
        cells = []
        for count in trainers:
            try:
                advice = advise(workload, times, count, TARGET)
                cells.append(f"{advice.replicas} ({advice.load / advice.replicas:.0%})")
                kept.append([name, count, advice.replicas, advice.chosen.wait_share, advice.one_down.wait_share])
            except ConfigError:
                cells.append("none")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    head = [f"| trainer; judge | {' | '.join(map(str, trainers))} |", f"| --- |{' ---: |' * len(trainers)}"]
    return head + rows, kept


def one_more(trainers: int = 30) -> tuple[list[str], Any]:
    """The wait at numbers around the advised one, and the trainers' time that one more replica is worth."""
    workload, times = PROFILES[CPU]
    advised = advise(workload, times, trainers, TARGET)
    rows, kept = [], []
    before = None
    for replicas in range(max(1, advised.replicas - 2), advised.replicas + 3):
        settings = FleetSettings(
            workload, times, trainers=trainers, replicas=replicas, batch_tokens=advised.batch_tokens
        )
        found = simulate(settings, seconds=20 * workload.step_s)
        worth = "" if before is None else f"{trainers * (before - found.wait_share):.2f}"
        rows.append(
            f"| {replicas} | {found.wait_share:.1%} | {found.latency_p99_s:.1f} | {found.utilisation:.0%} | {worth} |"
        )
        kept.append([replicas, found.wait_share, found.latency_p99_s, found.utilisation])
        before = found.wait_share
    return [
        "| replicas | wait | p99, s | busy | trainers' time that this one is worth |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ], kept


def failures(trainers: int = 10) -> tuple[list[str], Any]:
    """Waits with a failure every hour, or every five minutes, by the seconds until the replica is back."""
    workload, times = PROFILES[CPU]
    advised = advise(workload, times, trainers, TARGET)
    rows, kept = [], []
    for more in (0, 1):
        cells = []
        for every, restart in ((None, 30.0), (3600.0, 30.0), (3600.0, 300.0), (300.0, 30.0)):
            settings = FleetSettings(
                workload,
                times,
                trainers=trainers,
                replicas=advised.replicas + more,
                batch_tokens=advised.batch_tokens,
                failure_every_s=every,
                restart_s=restart,
                seed=1,
            )
            found = simulate(settings, seconds=2 * 3600.0)
            cells.append(f"{found.wait_share:.2%}")
            kept.append([advised.replicas + more, every, restart, found.wait_share, found.failures, found.lost])
        rows.append(f"| {advised.replicas + more} | {' | '.join(cells)} |")
    return [
        "| replicas | no failure | one an hour, back in 30 s | one an hour, in 5 minutes | one in 5 minutes, in 30 s |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ], kept


def hedging() -> tuple[list[str], Any]:
    """Four URLs in the client, with and without hedging, with and without a slow replica; beside the balancer."""
    workload, times = PROFILES[CPU]
    rows, kept = [], []
    for name, speeds in (("all alike", {}), ("one at a quarter of the speed", {0: 0.25}), ("one stuck", {0: 0.01})):
        for way, more in (
            ("balancer", {}),
            ("four URLs", {"balancer": False}),
            ("four URLs, hedge after 2 s", {"balancer": False, "hedge_after_s": 2.0}),
            ("four URLs, hedge after 8 s", {"balancer": False, "hedge_after_s": 8.0}),
        ):
            settings = FleetSettings(workload, times, trainers=12, replicas=4, speeds=speeds, **more)
            found = simulate(settings, seconds=40 * workload.step_s)
            rows.append(
                f"| {name} | {way} | {found.wait_share:.1%} | {found.latency_p50_s:.1f} | {found.latency_p99_s:.1f} "
                f"| {found.hedges} |"
            )
            kept.append([name, way, found.wait_share, found.latency_p99_s, found.hedges])
    head = ["| replicas | way | wait | p50, s | p99, s | hedged |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    return head + rows, kept


def autoscaling(trainers: int = 24) -> tuple[list[str], Any]:
    """Replicas and waits under each signal, window and cold start: 24 trainers find one replica."""
    workload, times = PROFILES[CPU]
    batch_tokens = best_batch_tokens(times, workload)
    advised = advise(workload, times, trainers, TARGET)
    targets: dict[str, float] = {
        "queue": advised.queue_items_target,
        "requests": advised.requests_target,
        "busy": 0.7,
    }
    rows, kept = [], []
    for signal, target in targets.items():
        for window in (15.0, 60.0, 300.0):
            cells = []
            for cold in (30.0, 300.0):
                settings = FleetSettings(
                    workload,
                    times,
                    trainers=trainers,
                    replicas=1,
                    batch_tokens=batch_tokens,
                    restart_s=cold,
                    autoscaler=Autoscaler(signal, target, window_s=window, most=16),  # type: ignore[arg-type]
                )
                first = simulate(settings, warm_up_s=0.0, seconds=900.0)
                later = simulate(settings, warm_up_s=1800.0, seconds=1800.0)
                cells.append(f"{first.wait_share:.1%} | {later.wait_share:.1%}, {later.replicas_mean:.1f}")
                kept.append([signal, target, window, cold, first.wait_share, later.wait_share, later.replicas_mean])
            rows.append(f"| {signal}, {target:g} | {window:.0f} | {' | '.join(cells)} |")
    return [
        "| signal, target | window, s | cold start 30 s: first 15 min | after 30 min | 5 minutes: first 15 min "
        "| after 30 min |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *rows,
    ], kept


def main() -> None:
    tables: dict[str, Callable[[], tuple[list[str], Any]]] = {
        "fleet replicas": lambda: replicas_needed([1, 3, 10, 30, 100, 300, 1000]),
        "fleet one more": one_more,
        "fleet failures": failures,
        "fleet hedging": hedging,
        "fleet autoscaling": autoscaling,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="document whose tables are replaced")
    parser.add_argument("--render", action="store_true", help="put the kept tables into the document, simulate nothing")
    parser.add_argument("--only", choices=[name.removeprefix("fleet ") for name in tables], nargs="+")
    arguments = parser.parse_args()
    for name, make in tables.items():
        if arguments.only and name.removeprefix("fleet ") not in arguments.only:
            continue
        file = RESULTS / "tables" / f"{name.removeprefix('fleet ')}.json"
        if arguments.render:
            lines = json.loads(file.read_text())["lines"]
        else:
            lines, numbers = make()
            write(file, {"lines": lines, "numbers": numbers})
        print(f"{name}\n" + "\n".join(lines), flush=True)
        if arguments.table is not None:
            put(arguments.table, name, lines)


if __name__ == "__main__":
    main()
