"""Signals that stop a run, and the lock on its output directory."""

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import filelock

from plaudit import atomic
from plaudit.errors import ConfigError, PlauditError
from plaudit.run.storage import writing

T = TypeVar("T")
POLL_S = 0.2
"""How often a wait checks for a stop signal."""


class StopRequested(PlauditError):
    """SIGTERM or Ctrl-C arrived. The CLI exits with 128 + the signal's number, as shells do."""

    can_be_resumed = True

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.exit_code - 128).name}"


class StopSignal:
    """Records SIGTERM and Ctrl-C for a graceful shutdown: the run finishes or abandons the step at a safe point."""

    def __init__(self) -> None:
        self._received: int | None = None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Handle both signals inside the block. A second signal has its default effect."""
        previous = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)

    @property
    def asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._received is not None

    def check(self) -> None:
        """Raise `StopRequested` if a signal has arrived."""
        if self._received is not None:
            raise StopRequested(self._received)

    def wait(self, future: "Future[T]") -> T:
        """The future's result. Raises `StopRequested` soon after a signal. There is no timeout of its own."""
        while True:
            self.check()
            try:
                return future.result(timeout=POLL_S)
            except FutureTimeout:
                if future.done():
                    raise


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Lock `directory` for one run. The operating system releases the lock when the process dies.

    A replacement that a killed process left unfinished (`plaudit.atomic`) is completed first.

    Raises:
        ConfigError: another run holds the lock.
        NotWritten: the directory can't be created or written to.
    """
    lock = filelock.FileLock(directory / atomic.LOCK)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(
                f"output_dir={directory} is in use by another run; wait for it or give another --output-dir"
            ) from error
    try:
        with writing(directory):
            atomic.finish(directory)
        yield
    finally:
        lock.release()
