"""The ranking service's uvicorn server: it announces itself and shuts down gracefully."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from plaudit.serving.server import KEEP_ALIVE_S, MAX_HEAD_BYTES, GracefulServer, drain_seconds


class Server(GracefulServer):
    """Announces itself, and drains on SIGTERM or Ctrl-C.

    During a drain `/readyz` gives 503, the port is closed, requests under way are answered and idle connections are
    closed. A second signal ends the process at once.
    """

    def __init__(self, app: FastAPI, grace_s: float, trusted_proxies: str, ready: Callable[[], None]) -> None:
        """`ready` is called when the server accepts connections."""
        config = uvicorn.Config(
            app,
            http="h11",  # bounds the head of a request, which httptools does not
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(drain_seconds(grace_s))),
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=trusted_proxies or None,
        )
        super().__init__(config, grace_s)
        self._app = app
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce."""
        await super().startup(sockets)
        asyncio.get_running_loop().call_soon(self._ready)

    def begin_drain(self) -> None:
        """Make `/readyz` give 503."""
        self._app.state.draining = True

    def end_drain(self) -> None:
        """Close every connection."""
        self.force_exit = True
