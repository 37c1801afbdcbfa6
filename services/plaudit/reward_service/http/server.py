"""The reward service's uvicorn server: readiness, reload on SIGHUP, graceful shutdown within the grace time.

Failure modes: an admitted request without an answer; a client that keeps the process alive by doing nothing.
"""

import asyncio
import ctypes
import errno
import functools
import logging
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from plaudit.reward_service.http.service import Service
from plaudit.reward_service.private_apis import PrivateApi, fallbacks
from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import KEEP_ALIVE_S, MAX_HEAD_BYTES, GracefulServer, drain_seconds

LATE_REQUESTS_S = 0.25
"""After the last admitted request is answered: how long requests on open connections still get 503."""
CLOSE_TIMEOUT_S = 1.5
"""After the port is closed: how long the last connections may take to send a request and get its 503."""
POLL_S = 0.01
FILTER_CHECK_S = 0.02
ACCEPT_TURNS = 5
"""Turns of the event loop in which connections that wait at the port are accepted; two are needed."""
SO_ATTACH_FILTER = 26
BPF_RETURN = 6
OTHER_FILES = 64
"""Open files reserved for the model, health probes beyond the bound, the log and the system."""
LINES_A_MINUTE = 20
"""Bound on log lines of uvicorn: warnings and tracebacks."""

Log = Callable[..., None]


@dataclass(frozen=True)
class Hooks:
    """What the program does when the server is ready, when it gets SIGHUP, and with log events."""

    ready: Callable[[], None]
    reload: Callable[[], Coroutine[None, None, None]]
    log: Log


class Server(GracefulServer):
    """Announces itself, reloads on SIGHUP, and drains on SIGTERM or Ctrl-C.

    During a drain `/readyz` gives 503 and nothing more is admitted, but the port stays open and new requests get 503.
    When the last admitted request is answered, or the grace time is nearly over, requests that are still arriving get
    503, and the port and all connections are closed. A second signal ends the drain at once.
    """

    def __init__(self, app: FastAPI, grace_s: float, hooks: Hooks, *, max_connections: int = 1024) -> None:
        self._service: Service = app.state.service
        self._can_drop_connections = SOCKET_FILTER.usable
        bound = connections_allowed(max_connections)
        if bound < max_connections:
            hooks.log("fewer-connections", bound=bound, detail=f"of {max_connections}: limited by ulimit -n")
        logging.getLogger("uvicorn.error").addFilter(LogRateLimit())
        config = uvicorn.Config(
            app,
            **self._protocol(bound),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config, grace_s)
        self._hooks = hooks
        self._stop_at = float("inf")
        self._reloads: set[asyncio.Task[None]] = set()

    def _protocol(self, bound: int) -> dict[str, Any]:
        """uvicorn's settings that say who parses requests, for at most `bound` connections."""
        if not HTTPTOOLS.usable:
            return {"http": "h11", "h11_max_incomplete_event_size": MAX_HEAD_BYTES, "limit_concurrency": bound}
        from plaudit.reward_service.http.connection import Connection

        return {"http": functools.partial(Connection, refused=self._count, bound=bound)}

    def _count(self, problem: ProblemError) -> None:
        """Count a refusal that no handler saw."""
        metrics = self._service.engine.metrics
        metrics.refused_requests.labels(problem.name).inc()
        metrics.responses.labels("unknown", problem.status).inc()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, log which fallbacks are in use, announce."""
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
        for api in fallbacks():
            self._hooks.log("fallback", missing=api.name, reason=api.problem, instead=api.fallback)
        self._hooks.ready()

    def _reload(self) -> None:
        task = asyncio.ensure_future(self._hooks.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    def begin_drain(self) -> None:
        """Stop admitting requests; those in flight have until `_stop_at`."""
        self._stop_at = time.monotonic() + drain_seconds(self._grace_s)
        self._service.engine.draining = True

    def end_drain(self) -> None:
        """Wait for nothing more."""
        self._stop_at = time.monotonic()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was admitted, refuse the rest, close the port and all connections."""
        began = time.monotonic()
        service, state = self._service, self.server_state
        accepted = len(service.in_flight)
        await self._until(lambda: not service.in_flight, self._stop_at)
        lost = len(service.in_flight)
        service.engine.fail_open_jobs()
        await self._until(lambda: not state.connections, time.monotonic() + LATE_REQUESTS_S)
        # Connections that wait at the port are accepted first: closing it would reset them.
        if self._can_drop_connections:
            for listener in sockets or []:
                _drop_new_connections(listener)
        for _ in range(ACCEPT_TURNS):
            await asyncio.sleep(0)
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        service.refuse_unadmitted()
        await self._until(lambda: not state.connections and not self._reloads, time.monotonic() + CLOSE_TIMEOUT_S)
        for connection in list(state.connections):
            connection.shutdown()
        # The connections that are left have answers which their clients don't read.
        await self._until(lambda: not state.connections, self._stop_at)
        for connection in list(state.connections):
            connection.transport.abort()
        seconds = round(time.monotonic() - began, 3)
        self._hooks.log("drained", accepted=accepted, answered=accepted - lost, seconds=seconds)

    async def _until(self, condition: Callable[[], bool], deadline: float) -> None:
        # Polled, as uvicorn does: no event tells when a connection has closed, and a second signal moves `_stop_at`.
        while not condition() and time.monotonic() < min(deadline, self._stop_at):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


def connections_allowed(wanted: int) -> int:
    """`wanted`, or fewer if the limit on open files, less `OTHER_FILES`, is lower."""
    try:
        import resource
    except ImportError:  # not on Windows
        return wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - OTHER_FILES))


class LogRateLimit(logging.Filter):
    """Passes at most `LINES_A_MINUTE`, so that a client that sends malformed requests can't fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._minute = 0.0
        self._said = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is within this minute's bound."""
        now = time.monotonic()
        if now > self._minute + 60:
            self._minute, self._said = now, 0
        self._said += 1
        return self._said <= LINES_A_MINUTE


def _drop_new_connections(listener: socket.socket) -> None:
    """Make the kernel drop every new connection to the port. Their clients try again a second later and find it closed.

    Otherwise a client could connect between the last look at the port and its end, and be cut off with a request sent.
    """
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RETURN, 0, 0, 0))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(drop_all)))


def _check_filter() -> None:
    if sys.platform != "linux":
        raise OSError(f"sockets have packet filters on Linux only, and this is {sys.platform}")
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as before, socket.socket() as after:
        before.settimeout(1.0)
        before.connect(listener.getsockname())
        _drop_new_connections(listener)
        after.setblocking(False)
        refused = after.connect_ex(listener.getsockname()) != errno.EINPROGRESS
        if refused or select.select([], [after], [], FILTER_CHECK_S)[1]:
            raise OSError("a connection was accepted, or refused, behind a filter that drops all packets")


def _check_httptools() -> None:
    from plaudit.reward_service.http.connection import check_connection

    # In a thread: an event loop may be running in this one.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, check_connection()).result()


HTTPTOOLS = PrivateApi(
    "uvicorn's httptools protocol",
    fallback="uvicorn's h11 protocol: slower, and without bounds on the time of a request's head",
    check=_check_httptools,
)
SOCKET_FILTER = PrivateApi(
    "a packet filter on the listening socket (SO_ATTACH_FILTER)",
    fallback="a client that connects in the last moment of a drain is cut off, and has to try again",
    check=_check_filter,
)
