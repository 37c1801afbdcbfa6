"""Programs in processes of their own: started, waited for, read line by line, ended. None outlives this process.

Failure modes: a wait without a bound; a program that continues after its test; a failure that hides the program's
output.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

READY_S = 200.0
END_S = 60.0
_OWNER = os.getpid()
_alive: set["subprocess.Popen[bytes]"] = set()


@atexit.register
def _end_what_is_left() -> None:
    if os.getpid() == _OWNER:  # a fork has the same set, and none of these processes
        for process in _alive:
            process.kill()
            process.wait()


class Program:
    """A command that runs at most once at a time, and again as often as it is begun.

    Its output is read with `next_line` and `next_event`, or goes to the file `log`, standard error included.
    `environment` is all of it, this process's by default; `user` and `directory` are whose and where it runs. As a
    context manager it is killed at the block's end.
    """

    def __init__(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        user: str | None = None,
        directory: Path | None = None,
    ) -> None:
        self.command = [str(part) for part in command]
        self.environment = dict(os.environ if environment is None else environment)
        self._log = log
        self._user = user
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    @property
    def running(self) -> bool:
        """Whether it was begun and not yet waited for or killed; it may have ended by itself."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._begun().pid

    def begin(self) -> None:
        """Start it and don't wait for it."""
        assert self._process is None, f"{self} runs already"
        with contextlib.ExitStack() as stack:
            output = subprocess.PIPE if self._log is None else stack.enter_context(self._log.open("ab"))
            self._process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=None if self._log is None else subprocess.STDOUT,
                env=self.environment,
                user=self._user,
                cwd=self._directory,
            )
        _alive.add(self._process)
        self._unread = b""

    def next_line(self, wait_s: float = READY_S) -> str:
        """The next line of its output, without the line break. Fails when none comes in time or it ended before."""
        deadline = time.monotonic() + wait_s
        while b"\n" not in self._unread:
            output = self._begun().stdout
            assert output is not None, f"{self} writes to {self._log}"
            readable, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            assert readable, f"{self} said nothing more for {wait_s:g} s"
            piece = os.read(output.fileno(), 2**16)
            assert piece, f"{self} ended with {self.wait()} before it said more"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def next_event(self) -> dict[str, Any]:
        """The next line of its output, which is JSON."""
        event: dict[str, Any] = json.loads(self.next_line())
        return event

    def wait_for_event(self, name: str) -> dict[str, Any]:
        """The next line, which must be this event."""
        event = self.next_event()
        assert event["event"] == name, event
        return event

    def close_output(self) -> None:
        """Read no more of it, so that the program writes to a closed pipe."""
        output = self._begun().stdout
        assert output is not None
        output.close()

    def until(self, condition: Callable[[], bool], what: str, *, wait_s: float = READY_S) -> None:
        """Wait for it. Fails after `wait_s`, and at once when the program has ended, with what it wrote to its log."""

        def reached() -> bool:
            ended = self._begun().poll()
            assert ended is None, f"{self} ended with {ended} before {what}\n{self._end_of_log()}"
            return condition()

        until(reached, what, wait_s=wait_s)

    def send_signal(self, number: int) -> None:
        """Send the signal and wait for nothing."""
        self._begun().send_signal(number)

    def wait(self, wait_s: float = END_S) -> int:
        """Wait for its end; the exit code. What it wrote last can still be read. Kills it and fails after `wait_s`."""
        process = self._begun()
        try:
            rest, _ = process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"{self} did not end within {wait_s:g} s\n{self._end_of_log()}") from None
        finally:
            _alive.discard(process)
            self._process = None
        self._unread += rest or b""
        return process.returncode

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the signal and wait for the end; the exit code, or 0 if it does not run."""
        if self._process is None:
            return 0
        self.send_signal(number)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def __str__(self) -> str:
        return " ".join(self.command)

    def _begun(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, f"{self} does not run"
        return self._process

    def _end_of_log(self) -> str:
        return "" if self._log is None else self._log.read_text(errors="replace")[-4000:]


@contextmanager
def running(
    *command: str | Path, log: Path, environment: Mapping[str, str] | None = None, directory: Path | None = None
) -> Iterator[Program]:
    """Run `command` as long as the block with its output in `log`; SIGTERM ends it, and SIGKILL if that doesn't."""
    program = Program(*command, log=log, environment=environment, directory=directory)
    program.begin()
    try:
        yield program
    finally:
        program.kill(signal.SIGTERM)


def until(condition: Callable[[], bool], what: str, *, wait_s: float = READY_S) -> None:
    """Wait for it; fails after `wait_s`, saying what did not come."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {wait_s:.0f} s for {what}"
        time.sleep(0.1)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
