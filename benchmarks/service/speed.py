"""Reward servers side by side: ours and others, the same model, the same texts, in turn.

    python -m benchmarks.service.speed closed --rounds 2 --seconds 6 --peer litserve=VENV/bin/python ...
    python -m benchmarks.service.speed open --servers ours naive
    python -m benchmarks.service.speed offline
    python -m benchmarks.service.speed front
    python -m benchmarks.service.speed idle --peer ...

The model is a random DistilBERT-base. Servers have core 0 (one torch thread), the load has core 1; only the server that
is measured runs, the others are stopped (SIGSTOP) meanwhile. `closed` has callers that each send their next text when
they have their last answer; `open` sends texts as they come (Poisson) at shares of what a closed loop of 64 got.
Rounds are interleaved, so that a slow minute of the machine hits every server; requests for each second of the server's
own CPU time tell what it does on a core that nobody else uses. Ratios compare servers of one number format. A server is
timed only if its rewards agree with the model's. Peers are named with the Python of their own environment;
docs/evidence/reward-speed.md says how to make them.
"""

import argparse
import contextlib
import fcntl
import operator
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.service.comparison import Timing, per_cpu_s, ratio, tables
from benchmarks.service.load import Measured, closed_loop, median_of, open_loop
from benchmarks.service.servers import (
    LENGTHS,
    LOAD_CORE,
    RECIPES,
    SERVER_CORE,
    Server,
    random_distilbert,
    run,
    servers,
    texts,
)
from benchmarks.tables import measured_on, put


@contextlib.contextmanager
def held(locks: Sequence[Path]) -> Iterator[None]:
    """For a machine that others measure on too."""
    with contextlib.ExitStack() as stack:
        for path in locks:
            fcntl.flock(stack.enter_context(path.open("w")), fcntl.LOCK_EX)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["closed", "open", "offline", "front", "idle"])
    parser.add_argument("--seconds", type=float, default=12.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.9, 2.0], help="shares of capacity, for open")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--servers", nargs="*", choices=RECIPES, default=["ours", "ours-int8", "naive", "pipeline"])
    parser.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PYTHON", help="and this, in its own Python"
    )
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="put the tables of `closed` between their marks")
    parser.add_argument("--lock", type=Path, action="append", default=[], help="file to hold a lock on while measuring")
    arguments = parser.parse_args()
    pythons = dict(arguments.peer)
    names = [*arguments.servers, *(name for name in pythons if name not in arguments.servers)]
    homeless = [name for name in names if RECIPES[name].needs_python and name not in pythons]
    if homeless:
        parser.error(f"{homeless[0]} runs in an environment of its own: --peer {homeless[0]}=PYTHON")
    if arguments.into is not None:
        document = arguments.into.read_text() if arguments.into.is_file() else ""
        for kind in arguments.lengths:
            if f"<!-- {mark_of(kind)} -->" not in document:
                parser.error(f"{arguments.into} has no line <!-- {mark_of(kind)} --> for the table")
    if arguments.what != "offline":
        os.sched_setaffinity(0, {LOAD_CORE})
    if arguments.what == "front":
        front(arguments.seconds, arguments.rounds)
    elif arguments.what == "offline":
        offline(arguments.rounds)
    else:
        with servers(names, pythons) as started:
            if arguments.what == "idle":
                idle(started, arguments.seconds)
            elif arguments.what == "closed":
                closed(started, arguments)
            else:
                open_(started, arguments)


def peer(named: str) -> tuple[str, str]:
    """The name of a server and the Python that runs it, from NAME=PYTHON."""
    name, _, python = named.partition("=")
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"no server is called {name!r}; choose from {', '.join(RECIPES)}")
    if not os.access(python, os.X_OK):
        raise argparse.ArgumentTypeError(f"{named!r} names no Python that can be run: {python!r}")
    return name, python


def closed(started: list[Server], arguments: argparse.Namespace) -> None:
    print(
        "lengths      callers server                        rps  a CPU s   p50 ms   p95 ms   p99 ms errors "
        " ratio, CPU s"
    )
    for kind in arguments.lengths:
        timings: list[Timing] = []
        for callers in arguments.callers:
            rounds: dict[str, list[Measured]] = {server.name: [] for server in started}
            for number in range(arguments.rounds):
                with held(arguments.lock):
                    for server in started:
                        with server.awake():
                            before = server.cpu_s()
                            work = closed_loop(server.url, server.draw(kind, number), callers, arguments.seconds)
                            result = run(work)
                            result.cpu_s = server.cpu_s() - before
                            rounds[server.name].append(result)
            of_count = [_timing(server, callers, rounds[server.name]) for server in started]
            timings += of_count
            for timing in of_count:
                milliseconds = (seconds * 1000 for seconds in (timing.p50_s, timing.p95_s, timing.p99_s))
                print(
                    f"{kind:12} {callers:7} {timing.server:25} {timing.rps:7.1f} {timing.per_cpu_s:8.1f} "
                    f"{' '.join(f'{cell:8.0f}' for cell in milliseconds)} {timing.errors:6} "
                    f"{ratio(timing, of_count):6.2f} {ratio(timing, of_count, per_cpu_s):6.2f}",
                    flush=True,
                )
        lines = tables(timings, {server.name: server.difference for server in started})
        print("\n".join(["", *lines, ""]), flush=True)
        if arguments.into is not None:
            heading = f"{kind} lengths, {measured_on('torch')}; requests per second:"
            put(arguments.into, mark_of(kind), [heading, "", *lines])


def _timing(server: Server, callers: int, results: list[Measured]) -> Timing:
    p50, p95, p99 = (median_of(results, operator.methodcaller("percentile", percent)) for percent in (50, 95, 99))
    return Timing(
        server=server.name,
        number_format=server.number_format,
        callers=callers,
        rps=median_of(results, operator.attrgetter("rps")),
        per_cpu_s=median_of(results, operator.attrgetter("per_cpu_s")),
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        errors=sum(each.errors.total() + len(each.refused) for each in results),
    )


def mark_of(kind: str) -> str:
    """The mark of the table in a document, for `put`."""
    return f"reward servers, {kind}"


def open_(started: list[Server], arguments: argparse.Namespace) -> None:
    print("lengths       load server               sent/s    ok/s   p50 ms   p95 ms   p99 ms   429  429 p50/p99 errors")
    for kind in arguments.lengths:
        for server in started:
            with held(arguments.lock), server.awake():
                capacity = run(closed_loop(server.url, server.draw(kind, 0), 64, arguments.seconds)).rps
                for load in arguments.loads:
                    draw = server.draw(kind, 1)
                    result = run(open_loop(server.url, draw, capacity * load, arguments.seconds))
                    milliseconds = " ".join(f"{result.percentile(q) * 1000:8.0f}" for q in (50, 95, 99))
                    refusals = "/".join(f"{result.percentile(q, refused=True) * 1000:.1f}" for q in (50, 99))
                    print(
                        f"{kind:12} {load:5.0%} {server.name:19} {capacity * load:7.1f} {result.rps:7.1f} "
                        f"{milliseconds} {len(result.refused):5} {refusals:>15} {dict(result.errors)}",
                        flush=True,
                    )


def idle(started: list[Server], seconds: float) -> None:
    print(f"{'server':19} CPU while nothing is asked, share of a core")
    for server in started:
        with server.awake():
            time.sleep(1)
            before = server.cpu_s()
            time.sleep(seconds)
            print(f"{server.name:19} {(server.cpu_s() - before) / seconds:6.1%}", flush=True)


def front(seconds: float, rounds: int) -> None:
    """The service with a model that costs nothing, one core."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    request = RECIPES["ours"].request("This movie was great and wonderful, I would watch it again and again.")
    command = ["taskset", "-c", str(SERVER_CORE), sys.executable, "-m", "benchmarks.service.null_model", str(port)]
    process = subprocess.Popen(command)
    try:
        while True:
            with contextlib.suppress(OSError):
                run(closed_loop(url, lambda: request, 16, 1.0))
                break
            time.sleep(0.2)
        watched = psutil.Process(process.pid)
        for callers in (16, 64, 256):
            for _ in range(rounds):
                before = watched.cpu_times()
                result = run(closed_loop(url, lambda: request, callers, seconds))
                after = watched.cpu_times()
                busy = after.user + after.system - before.user - before.system
                print(
                    f"{callers:4} callers: {result.rps:7.0f} requests/s, {len(result.ok) / busy:7.0f} a CPU second, "
                    f"p50 {result.percentile(50) * 1000:.1f} ms, p99 {result.percentile(99) * 1000:.1f} ms, "
                    f"errors {result.errors.total()}",
                    flush=True,
                )
    finally:
        process.terminate()
        process.wait()


def batches(encoded: Sequence[Any], tokens: int) -> Iterator[list[Any]]:
    """In order, of at most so many tokens each."""
    batch: list[Any] = []
    for text in encoded:
        if batch and sum(len(each.ids) for each in batch) + len(text.ids) > tokens:
            yield batch
            batch = []
        batch.append(text)
    yield batch


def offline(rounds: int, count: int = 128, tokens: int = 2048) -> None:
    """Texts a second of the model called directly, in large batches without padding: what a server could do at most."""
    import torch

    from plaudit.reward_service.engine.scorer import load_scorer
    from plaudit.reward_service.settings import Settings

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = random_distilbert(Path(folder) / "model")
        scorers = {dtype: load_scorer(Settings(model=str(model), dtype=dtype)) for dtype in ("fp32", "int8")}
        for kind in LENGTHS:
            for number in range(rounds):
                for dtype, scorer in scorers.items():
                    encoded = scorer.encode([(text, None) for text in texts(kind, count, number)])
                    started = time.process_time()
                    for batch in batches(encoded, tokens):
                        scorer.score(batch, 0)
                    print(
                        f"{kind:12} {dtype} {count / (time.process_time() - started):6.1f} texts a CPU second",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
