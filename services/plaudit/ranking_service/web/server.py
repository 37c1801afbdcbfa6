"""uvicorn with a start that is announced and an end that comes: from SIGTERM to exit within the grace time."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator

import uvicorn
from fastapi import FastAPI

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none is closed just as its next request leaves."""
EXIT_S = 0.5
"""Part of the grace time that is kept for leaving; at most a quarter of it."""
MAX_HEAD_BYTES = 64 * 1024


class Server(uvicorn.Server):
    """Announces itself, drains on SIGTERM or Ctrl-C, and a clean end is exit code 0.

    A drain goes so: `/readyz` is red, the port is closed, requests under way are answered, idle connections are closed.
    """

    def __init__(self, app: FastAPI, grace_s: float, trusted_proxies: str, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # bounds the head of a request, which httptools does not
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(grace_s - min(EXIT_S, grace_s / 4))),
                server_header=False,
                proxy_headers=bool(trusted_proxies),
                forwarded_allow_ips=trusted_proxies or None,
            )
        )
        self._app = app
        self._grace_s = grace_s
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().call_soon(self._ready)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        before = {number: signal.signal(number, self._told) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: object) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self._app.state.draining = True
        self.should_exit = True
        # Whatever hangs: the process ends in time. Everything that was answered is on disk.
        watchdog = threading.Timer(self._grace_s, os._exit, (0,))
        watchdog.daemon = True
        watchdog.start()
