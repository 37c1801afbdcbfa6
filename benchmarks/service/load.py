"""HTTP load over raw sockets: keep-alive connections, closed or open loop, so light that the server is the limit.

One request text in, its latency and status out. Nothing here knows what the server is.
"""

import asyncio
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

DRAIN_S = 60.0
"""How long an open loop waits at its end for answers that are due."""

Draw = Callable[[], bytes]
"""The next request, as bytes on the wire."""


def http_request(path: str, body: bytes) -> bytes:
    """A JSON POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """A kept connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("closed before the answer"))

    def data_received(self, data: bytes) -> None:
        self._received = self._received + data if self._received else data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        lower = head.lower()
        place = lower.find(b"content-length:")
        if place >= 0:
            complete = len(body) >= int(lower[place + 15 :].split(b"\r\n", 1)[0])
        else:
            complete = body.endswith(b"0\r\n\r\n")
        if complete and self._answer is not None:
            self._received = b""
            self._answer.set_result(int(head[9:12]))

    def send(self, request: bytes) -> "asyncio.Future[int]":
        """Send; the future is the answer's status, or raises what broke the connection."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self._answer.set_exception(ConnectionError("closed"))
        else:
            self._transport.write(request)
        return self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@dataclass
class Measured:
    """What came back, and how long it took. Seconds."""

    elapsed: float = 0.0
    ok: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    """Latency of each 429."""
    errors: Counter[str] = field(default_factory=Counter)
    cpu_s: float = math.nan
    """CPU time of the server, where the caller knows it."""

    @property
    def rps(self) -> float:
        return len(self.ok) / self.elapsed

    @property
    def per_cpu_s(self) -> float:
        """Requests for each second of the server's CPU time."""
        return len(self.ok) / self.cpu_s

    def percentile(self, percent: int, *, refused: bool = False) -> float:
        seconds = sorted(self.refused if refused else self.ok)
        return seconds[max(0, math.ceil(len(seconds) * percent / 100) - 1)] if seconds else math.nan

    def count(self, status: int, seconds: float) -> None:
        if status == 200:
            self.ok.append(seconds)
        elif status == 429:
            self.refused.append(seconds)
        else:
            self.errors[str(status)] += 1


def median_of(rounds: list[Measured], value: Callable[[Measured], float]) -> float:
    """Over rounds, of what `value` reads from each."""
    return statistics.median(map(value, rounds))


async def closed_loop(url: str, draw: Draw, callers: int, seconds: float) -> Measured:
    """`callers` connections, each sending its next request when it has its last answer, for so many seconds."""
    measured = Measured()
    connections = [await _connect(url) for _ in range(callers)]
    started = time.perf_counter()

    async def caller(connection: Connection) -> None:
        while (sent := time.perf_counter()) < started + seconds:
            try:
                status = await connection.send(draw())
            except ConnectionError as error:
                measured.errors[type(error).__name__] += 1
                connection = await _connect(url)
            else:
                measured.count(status, time.perf_counter() - sent)

    await asyncio.gather(*map(caller, connections))
    measured.elapsed = time.perf_counter() - started
    for connection in connections:
        connection.close()
    return measured


async def open_loop(url: str, draw: Draw, rate: float, seconds: float, seed: int = 0) -> Measured:
    """Requests that arrive as they will (Poisson, `rate` a second), whether or not the earlier ones are answered."""
    measured = Measured()
    times = random.Random(seed)
    idle: list[Connection] = []
    running: set[asyncio.Task[None]] = set()
    started = time.perf_counter()

    async def one() -> None:
        sent = time.perf_counter()
        try:
            connection = idle.pop() if idle else await _connect(url)
            status = await connection.send(draw())
        except OSError as error:
            measured.errors[type(error).__name__] += 1
        else:
            measured.count(status, time.perf_counter() - sent)
            idle.append(connection)

    due = started
    while (due := due + times.expovariate(rate)) < started + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one())
        running.add(task)
        task.add_done_callback(running.discard)
    measured.elapsed = time.perf_counter() - started
    if running:
        _, late = await asyncio.wait(list(running), timeout=DRAIN_S)
        measured.errors["no answer"] += len(late)
        for task in late:
            task.cancel()
    for connection in idle:
        connection.close()
    return measured


async def _connect(url: str) -> Connection:
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    assert parts.port is not None, url
    _, connection = await asyncio.get_running_loop().create_connection(Connection, parts.hostname, parts.port)
    return connection
