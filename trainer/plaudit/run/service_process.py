"""Start a service as a process of its own on this machine, and stop it. It is still spoken to over HTTP.

Failure modes: a service continues after the process that started it was killed, and holds its memory or its database.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from plaudit.errors import ConfigError

POLL_S = 0.1
STOP_TIMEOUT_S = 15.0
_ENDING_WITH_ITS_PARENT = """
import ctypes, os, runpy, signal, sys
parent, module, *arguments = sys.argv[1:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(parent):
    sys.exit(128 + signal.SIGTERM)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""Runs a module in a process that Linux ends with SIGTERM when its parent has died, even by SIGKILL."""


@contextmanager
def reward_service(
    model: str,
    directory: Path,
    *,
    ready_timeout_s: float,
    threads: int = 1,
    device: str | None = None,
    flags: Sequence[str] = (),
    name: str = "reward-service",
) -> Iterator[str]:
    """Serve `model` on a free port for the length of the block; gives the URL. The service's output goes to
    `directory/NAME.log`. `device` is where the model runs, by default where the service puts it;
    `flags` are any others of `plaudit-reward`.

    Raises:
        ConfigError: the service isn't installed, can't load the model, or isn't ready in time.
    """
    flags = ("--model", model, "--threads", str(threads), *(() if device is None else ("--devices", device)), *flags)
    # A stray REWARD_* variable is meant for a service that the user starts, not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REWARD_")}
    with _service(
        "plaudit.reward_service", directory, name, flags=flags, environment=environment, timeout_s=ready_timeout_s
    ) as url:
        yield url


@contextmanager
def ranking_service(database: Path, directory: Path, *, api_key: str, ready_timeout_s: float) -> Iterator[str]:
    """Serve the rankings of a SQLite file on a free port for the length of the block; gives the URL.

    Made for programs of this machine that rank: they may ask as often as they like.

    Raises:
        ConfigError: the service isn't installed, can't use the database, or isn't ready in time.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RANK_")}
    environment |= {"RANK_DATABASE": str(database), "RANK_API_KEY": api_key}
    unlimited = ("--requests-per-minute", "0", "--requests-per-minute-address", "0")
    with _service(
        "plaudit.ranking_service",
        directory,
        "ranking-service",
        command=("serve",),
        flags=unlimited,
        environment=environment,
        timeout_s=ready_timeout_s,
    ) as url:
        yield url


@contextmanager
def _service(
    module: str,
    directory: Path,
    name: str,
    *,
    command: Sequence[str] = (),
    flags: Sequence[str],
    environment: Mapping[str, str],
    timeout_s: float,
) -> Iterator[str]:
    what = name.replace("-", " ")
    if importlib.util.find_spec("fastapi") is None:
        extra = "rank" if module == "plaudit.ranking_service" else "reward"
        raise ConfigError(f"the {what} is not installed: pip install 'plaudit[{extra}]'")
    directory.mkdir(parents=True, exist_ok=True)
    ready_file, log_file = directory / f"{name}.json", directory / f"{name}.log"
    ready_file.unlink(missing_ok=True)
    linux = sys.platform == "linux"
    program = ["-c", _ENDING_WITH_ITS_PARENT, str(os.getpid()), module] if linux else ["-m", module]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, *command, "--port", "0", *flags, "--ready-file", str(ready_file)],
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(process, what, ready_file, log_file, timeout_s)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        ready_file.unlink(missing_ok=True)


def _wait_until_ready(
    process: subprocess.Popen[bytes], what: str, ready_file: Path, log_file: Path, timeout_s: float
) -> str:
    deadline = time.monotonic() + timeout_s
    while not ready_file.exists():
        if process.poll() is not None:
            lines = log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise ConfigError(f"the {what} ended with code {process.returncode}: {lines[-1]}")
        if time.monotonic() > deadline:
            raise ConfigError(f"the {what} was not ready after {timeout_s:.0f} s; see {log_file}")
        time.sleep(POLL_S)
    url: str = json.loads(ready_file.read_text(encoding="utf-8"))["url"]
    return url
