"""What the reward service does under load when it is stopped, reloaded, poisoned and overrun, in counts.

    python -m benchmarks.service.under_load drain --rounds 5
    python -m benchmarks.service.under_load reload --seconds 60
    python -m benchmarks.service.under_load poison --seconds 60
    python -m benchmarks.service.under_load overload --minutes 10

The service is the real program in a process of its own. Every reward that comes back is compared with the one that the
same model gives in this process. A request is `answered` when it got its rewards, `refused` when it got 429 or 503 or
found the port closed, `failed` when it got a 500 that names its poisonous item, `lost` when it was sent and no answer
came, and `wrong` when an answer isn't what it must be. Lost and wrong must be 0.
"""

import argparse
import asyncio
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import httpx
import psutil

from harness.load.rewards import LABEL, Load, Rewards, Tally, drain, poison, reload, some_texts
from harness.reward_service import RewardService

KEPT_S = 30.0
"""How long an idle connection is good for another request."""
SAMPLE_S = 30.0
"""Between two looks at the service's memory."""


class Wire:
    """Just enough of HTTP/1.1 to send more than the service can take; httpx would want a core for that."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, *, json: Any) -> httpx.Response:
        body = dumps(json).encode()
        headers = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        try:
            reader, writer = await self._connection()
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        try:
            writer.write(f"POST {path} HTTP/1.1\r\n{headers}".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = [line.partition(": ") for line in answer.lower().split("\r\n")]
            [length] = [int(value) for name, _, value in lines if name == "content-length"]
            content = await reader.readexactly(length)
        except (OSError, EOFError) as error:
            writer.close()
            raise httpx.ReadError(repr(error)) from error
        self._idle.append((time.monotonic(), reader, writer))
        return httpx.Response(int(answer.split()[1]), content=content)

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that was used last and not long ago, or a new one: the service closes what is idle for long."""
        while self._idle:
            since, reader, writer = self._idle.pop()
            if not reader.at_eof() and time.monotonic() < since + KEPT_S:
                return reader, writer
            writer.close()
        return await asyncio.open_connection(*self._address)

    async def close(self) -> None:
        for _, _, writer in self._idle:
            writer.close()
            await writer.wait_closed()


@dataclass
class Overload:
    """What `overload` saw."""

    tally: Tally
    capacity: float
    """Requests a second that the service answers when it has always work."""
    memory: list[float]
    """Resident MiB, at the start and then every `SAMPLE_S`."""
    behind: list[float]
    """Seconds by which each request left later than it should have: the load's own weakness."""


async def overload(
    model: Path, *, seconds: float, share: float, core: str | None = None, flags: Sequence[str] = ()
) -> Overload:
    """Requests that come at `share` times the rate that can be served: the accepted are answered, the rest gets 429."""
    rewards = Rewards(some_texts())
    rewards.learn(model)
    wrapper = ("taskset", "-c", core) if core else ()
    with RewardService(model, "--label", LABEL, *flags, wrapper=wrapper) as service:
        async with Load(service.url, rewards).running(32) as load:
            await load.answered(300)
            began, before = time.perf_counter(), load.tally.answered
            while time.perf_counter() < began + 10:
                await load.answered(20)
            capacity = (load.tally.answered - before) / (time.perf_counter() - began)
        load = Load(service.url, rewards, seed=1)
        gc.freeze()  # looking at torch's objects would hold up the load, and let it come in a burst afterwards
        memory: list[float] = []
        sampling = asyncio.create_task(_sample(service, memory))
        http = Wire(service.url)
        behind = await _open_loop(lambda: load.ask(http), rate=share * capacity, seconds=seconds)
        await http.close()
        sampling.cancel()
        return Overload(load.tally, capacity, memory, behind)


async def _sample(service: RewardService, memory: list[float]) -> None:
    while True:
        memory.append(psutil.Process(service.pid).memory_info().rss / 2**20)
        await asyncio.sleep(SAMPLE_S)


async def _open_loop(ask: Callable[[], Coroutine[Any, Any, bool]], *, rate: float, seconds: float) -> list[float]:
    """Ask at random times, `rate` a second, however long the answers take."""
    arrivals = random.Random(1)
    open_requests: set[asyncio.Task[bool]] = set()
    behind = []
    began = due = time.perf_counter()
    while due < began + seconds:
        due += arrivals.expovariate(rate)
        await asyncio.sleep(due - time.perf_counter())
        behind.append(time.perf_counter() - due)
        task = asyncio.create_task(ask())
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
    await asyncio.gather(*open_requests)
    return behind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["drain", "reload", "poison", "overload"])
    parser.add_argument("--model", type=Path, default=Path("models/imdb-distilbert-mini"))
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="of drain")
    parser.add_argument("--seconds", type=float, default=60.0, help="of reload and poison")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--share", type=float, default=2.0, help="of capacity, for overload")
    parser.add_argument("--core", help="where the service runs, for overload; run this with taskset on another")
    parser.add_argument("--flags", default="", help="further flags of the service, for overload")
    arguments = parser.parse_args()
    if arguments.scenario == "overload":
        seconds = arguments.minutes * 60
        settings = {"share": arguments.share, "core": arguments.core, "flags": arguments.flags.split()}
        seen = asyncio.run(overload(arguments.model, seconds=seconds, **settings))
        tally = seen.tally
        print(
            f"capacity {seen.capacity:.0f} requests/s, offered {tally.sent / seconds:.0f} for {arguments.minutes:g} min"
        )
        print(tally)
        print(f"ms until answered: {percentiles(tally.seconds)}")
        print(f"ms until 429: {percentiles(tally.refused_seconds)}")
        print(f"ms that the load itself was late: {percentiles(seen.behind)}")
        print(f"resident MiB every {SAMPLE_S:g} s: {', '.join(f'{mib:.0f}' for mib in seen.memory)}")
        sys.exit(not tally.complete)
    enough = after(arguments.seconds)
    if arguments.scenario == "drain":
        tallies = [
            asyncio.run(drain(arguments.model, callers=arguments.callers, answers=500)) for _ in range(arguments.rounds)
        ]
        print(*tallies, sep="\n")
        print(f"drained within {max(tally.seconds[0] for tally in tallies)} s")
    elif arguments.scenario == "reload":
        tally, happened = asyncio.run(reload(arguments.model, callers=arguments.callers, answers=50, enough=enough))
        tallies = [tally]
        print(tally, dict(happened), "answers by revision", sorted(tally.by_revision.values()))
    else:
        tallies = [asyncio.run(poison(arguments.model, callers=arguments.callers, enough=enough))]
        print(tallies[0])
    sys.exit(not all(tally.complete for tally in tallies))


def after(seconds: float) -> Callable[[object], bool]:
    """Whether so much time has passed since it was first asked."""
    until: list[float] = []

    def over(_: object) -> bool:
        if not until:
            until.append(time.monotonic() + seconds)
        return time.monotonic() > until[0]

    return over


def percentiles(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return "-"
    cuts = statistics.quantiles(seconds, n=1000)
    return (
        ", ".join(f"p{p / 10:g} {cuts[p - 1] * 1e3:.1f}" for p in (500, 950, 990, 999))
        + f", max {max(seconds) * 1e3:.1f}"
    )


if __name__ == "__main__":
    main()
