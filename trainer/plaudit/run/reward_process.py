"""Start and stop the reward service as a separate process on this machine. Requests still go over HTTP."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from plaudit.errors import ConfigError

POLL_S = 0.1
STOP_TIMEOUT_S = 15.0


@contextmanager
def reward_service(
    model: str,
    directory: Path,
    *,
    ready_timeout_s: float,
    threads: int = 1,
    device: str | None = None,
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """Serve `model` on a free port inside the block; yields the URL. The service logs to
    `directory/reward-service.log`. `device` is the model's device, by default the service's choice. `flags` are further
    flags of `plaudit-reward`.

    Raises:
        ConfigError: the service isn't installed, can't load the model, or isn't ready in time.
    """
    if importlib.util.find_spec("fastapi") is None:
        raise ConfigError("the reward service is not installed: pip install 'plaudit[reward]'")
    directory.mkdir(parents=True, exist_ok=True)
    ready_file, log_file = directory / "reward-service.json", directory / "reward-service.log"
    ready_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "plaudit.reward_service",
        "--model",
        model,
        "--port",
        "0",
        "--threads",
        str(threads),
        *(() if device is None else ("--devices", device)),
        *flags,
    ]
    # REWARD_* variables are meant for services that the user starts, not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready_file)], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        yield _wait_until_ready(process, ready_file, log_file, ready_timeout_s)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        ready_file.unlink(missing_ok=True)


def _wait_until_ready(process: subprocess.Popen[bytes], ready_file: Path, log_file: Path, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not ready_file.exists():
        if process.poll() is not None:
            lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise ConfigError(f"the reward service ended with code {process.returncode}: {lines[-1]}")
        if time.monotonic() > deadline:
            raise ConfigError(f"the reward service was not ready after {timeout_s:.0f} s; see {log_file}")
        time.sleep(POLL_S)
    url: str = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
    return url
