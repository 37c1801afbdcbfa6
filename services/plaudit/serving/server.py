"""A uvicorn server that shuts down gracefully: the first signal begins a drain, and the process ends in time.

Failure modes: a client, or a handler that hangs, keeps the process alive beyond its grace time.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Generator

import uvicorn

KEEP_ALIVE_S = 75
"""Longer than clients keep an idle connection, so that none is closed just as its next request leaves."""
EXIT_S = 0.5
"""Part of the grace time that is reserved for closing connections and exiting; at most a quarter of it."""
MAX_HEAD_BYTES = 64 * 1024
"""Bytes that the request line and headers may hold together."""


class GracefulServer(uvicorn.Server):
    """Drains on SIGTERM or Ctrl-C; a second signal ends the drain. A clean end is exit code 0."""

    def __init__(self, config: uvicorn.Config, grace_s: float) -> None:
        """`grace_s` is the time from the first signal to the end of the process, whatever hangs."""
        super().__init__(config)
        self._grace_s = grace_s

    def begin_drain(self) -> None:
        """Stop accepting work. Called in a signal handler, once."""
        raise NotImplementedError

    def end_drain(self) -> None:
        """Stop waiting for accepted work. Called in a signal handler, for every further signal."""
        raise NotImplementedError

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGTERM and SIGINT inside the block. uvicorn's own version would raise them again at the end."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.should_exit:
            self.end_drain()
            return
        self.begin_drain()
        self.should_exit = True
        # A hung event loop or forward pass can't delay the end: everything that was answered is done.
        watchdog = threading.Timer(self._grace_s, os._exit, (0,))
        watchdog.daemon = True
        watchdog.start()


def drain_seconds(grace_s: float) -> float:
    """The part of the grace time in which accepted requests are answered."""
    return grace_s - min(EXIT_S, grace_s / 4)
