"""Faults under the load of many trainers: a replica killed, slow, added; all replicas reloaded one after the other.

    python -m benchmarks.fleet.faults

Each case is a JSON file in `results/faults` and a row of the printed table: how long trainers waited, which answers
came that were no rewards, and which trainers stopped. In `reload` the model in the replicas' directory is replaced and
every replica reloads it: a trainer must see one revision or stop, unless it allows the change.
"""

import argparse
import asyncio
import dataclasses
import http.client
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fleet.points import DEMO, RESULTS
from benchmarks.fleet.results import write
from benchmarks.fleet.testbed import JUDGE, Fleet, Model, fleet
from benchmarks.fleet.trainers import Seen, run_trainers
from benchmarks.tables import put
from harness.load.rewards import negated
from harness.processes import until
from plaudit import demo_models
from plaudit.sizing.workload import from_run

MODEL = Model("sleep", 0.05, 0.0002)
ADMIN = "the-administrators-key"
SECONDS = 16.0
AT_S = 5.0
"""When the fault happens."""

During = Callable[[Fleet], Awaitable[None]]


async def nothing(running: Fleet) -> None:
    """The fleet as it is."""


async def kill(running: Fleet) -> None:
    """SIGKILL to one replica, which is started again at once."""
    await asyncio.sleep(AT_S)
    victim = running.services[0]
    await asyncio.to_thread(victim.kill)
    victim.begin()
    await asyncio.to_thread(victim.wait_until_ready)


async def add(running: Fleet) -> None:
    """The last replica was away from the start, and comes."""
    await asyncio.sleep(AT_S)
    running.services[-1].begin()
    await asyncio.to_thread(running.services[-1].wait_until_ready)


def reload(directory: Path) -> During:
    """Another model in the directory, and every replica reloads it, one after the other."""

    async def rolling(running: Fleet) -> None:
        await asyncio.sleep(AT_S)
        other = negated(directory, directory.with_name("other"))
        shutil.copy(other / "model.safetensors", directory / "model.safetensors")
        for service in running.services:
            await asyncio.to_thread(_reload, service.port)

    return rolling


def _reload(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/model:reload", headers={"Authorization": f"Bearer {ADMIN}"})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status == 200, answer.status


def measured(
    running: Fleet, trainers: int, stretch: float, during: During, *, allow_revision_change: bool = False
) -> dict[str, Any]:
    """What the trainers saw of it."""
    workload = from_run(DEMO).stretched(stretch)

    def start(seen: Seen) -> "asyncio.Future[None]":
        return asyncio.ensure_future(during(running))

    seen = asyncio.run(
        run_trainers(
            [running.url],
            running.keys[:trainers],
            workload,
            warm_up_s=1.2 * workload.step_s,
            seconds=SECONDS,
            during=start,
            allow_revision_change=allow_revision_change,
        )
    )
    waits = [min(end, seen.end) - max(begin, seen.begin) for _, begin, end in seen.waits if end > seen.begin]
    revisions = [len(known) for known in seen.revisions.values()]
    return {
        **seen.figures(trainers),
        "longest_wait_s": max(waits, default=0.0),
        "not_200": {status: count for status, count in seen.statuses.items() if status != "200"},
        "most_revisions_of_a_trainer": max(revisions, default=0),
        "stopped": sorted(message[:60] for message in seen.stopped.values()),
    }


HEAD = (
    "| case | texts/s | wait | longest wait, s | p99, s | other than 200 | revisions of a trainer, stopped |",
    "| --- | ---: | ---: | ---: | ---: | --- | --- |",
)


def row(name: str, found: dict[str, Any]) -> str:
    others = ", ".join(f"{count} x {status}" for status, count in found["not_200"].items())
    cells = [
        name,
        f"{found['texts_per_s']:.0f}",
        f"{found['wait_share']:.1%}",
        f"{found['longest_wait_s']:.1f}",
        f"{found['latency_p99_s']:.2f}",
        others or "none",
        f"{found['most_revisions_of_a_trainer']}, {len(found['stopped'])} stopped",
    ]
    return f"| {' | '.join(cells)} |"


def cases(wanted: Sequence[str], trainers: int, replicas: int, stretch: float) -> None:
    def one(name: str, during: During, **more: Any) -> None:
        if name not in wanted:
            return
        flags = more.pop("flags", ())
        allow = more.pop("allow_revision_change", False)
        away = more.pop("away", False)
        with fleet(MODEL, replicas, trainers=trainers, flags=flags, **more) as running:
            if away:
                running.services[-1].kill()
                until(lambda: running.up() == replicas - 1, "the balancer to notice")
            found = measured(running, trainers, stretch, during, allow_revision_change=allow)
            if name in ("kill", "add"):
                running.wait_for(replicas)
        write(RESULTS / "faults" / f"{name}.json", {"trainers": trainers, "replicas": replicas, "measured": found})
        print(row(name, found), flush=True)

    print("\n".join(HEAD), flush=True)
    one("none", nothing)
    one("kill", kill)
    one("slow", nothing, models={0: dataclasses.replace(MODEL, batch_s=0.4, token_s=0.0016)})
    one("away", nothing, away=True)
    one("add", add, away=True)
    for name, allow in (("reload", False), ("reload-allowed", True)):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(shutil.copytree(demo_models.resolve(JUDGE), Path(place) / "judge"))
            admin = Path(place) / "admin"
            admin.write_text(f"{ADMIN}\n")
            admin.chmod(0o600)
            one(
                name,
                reload(directory),
                directory=directory,
                flags=("--admin-key-file", str(admin)),
                allow_revision_change=allow,
            )


def main() -> None:
    names = ["none", "kill", "slow", "away", "add", "reload", "reload-allowed"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--trainers", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--stretch", type=float, default=0.3)
    parser.add_argument("--table", type=Path, help="document whose table is replaced by the kept results; runs nothing")
    arguments = parser.parse_args()
    if arguments.table is not None:
        kept = {name: RESULTS / "faults" / f"{name}.json" for name in names}
        rows = [row(name, json.loads(file.read_text())["measured"]) for name, file in kept.items() if file.exists()]
        put(arguments.table, "fleet faults", [*HEAD, *rows])
        return
    cases(arguments.only, arguments.trainers, arguments.replicas, arguments.stretch)


if __name__ == "__main__":
    main()
