"""Programs that run as long as a block, and waiting for what they do."""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(*command: str, log: Path) -> Iterator[None]:
    """Run `command` with its output in `log`; it gets SIGTERM and half a minute at the end."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def until(condition: Callable[[], bool], what: str, *, wait_s: float = 200.0) -> None:
    """Wait for it; fails after `wait_s`, saying what did not come."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {wait_s:.0f} s for {what}"
        time.sleep(0.1)
