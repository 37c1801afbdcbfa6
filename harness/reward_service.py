"""The real reward service in a process of its own, to be killed and restarted by tests."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 120.0


def python_path(tree: Path) -> str:
    """Where Python finds the code of a checkout."""
    return os.pathsep.join((str(tree / "services"), str(tree / "trainer")))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def status_of_a_request(port: int, label: str = "POSITIVE") -> int:
    """Ask for one reward and don't repeat it, whatever comes: the status, or 0 when there is no whole answer."""
    body = json.dumps({"items": [{"prompt": "This movie", "response": " was wonderful."}], "label": label}).encode()
    url = f"http://127.0.0.1:{port}/v1/rewards"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["rewards"]) == 1
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return 0


class RewardService:
    """`python -m plaudit.reward_service` on a port that stays the same over restarts."""

    def __init__(self, model: Path, *flags: str, api_key: str | None = None, wrapper: tuple[str, ...] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._model = model
        self._flags = flags
        self._wrapper = wrapper
        self._environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if api_key is not None:
            self._environment["REWARD_API_KEY"] = api_key
        self._process: subprocess.Popen[str] | None = None
        self.begin()
        self.wait_until_ready()

    def run_code_of(self, tree: Path | None) -> None:
        """From the next `begin` on, run the code of another checkout; None is this one."""
        self._environment.pop("PYTHONPATH", None)
        if tree is not None:
            self._environment["PYTHONPATH"] = python_path(tree)
        elif "PYTHONPATH" in os.environ:
            self._environment["PYTHONPATH"] = os.environ["PYTHONPATH"]

    @property
    def running(self) -> bool:
        """Whether it was begun and not ended by us."""
        return self._process is not None

    def begin(self, model: Path | None = None) -> None:
        """Start the process and don't wait for it."""
        assert self._process is None
        command = [sys.executable, "-m", "plaudit.reward_service", "--model", str(model or self._model)]
        where = ["--port", str(self.port), "--threads", "1"]
        self._process = subprocess.Popen(
            [*self._wrapper, *command, *where, *self._flags], stdout=subprocess.PIPE, text=True, env=self._environment
        )

    def wait_until_ready(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert json.loads(line)["event"] == "ready", line

    def send_signal(self, number: int) -> None:
        """Send the signal and wait for nothing."""
        assert self._process is not None
        self._process.send_signal(number)

    def next_event(self) -> dict[str, Any]:
        """The next line that the process logs."""
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        event: dict[str, Any] = json.loads(line)
        return event

    def close_log(self) -> None:
        """Read no more of what the process logs."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        assert self._process is not None
        code = self._process.wait(timeout=60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the signal and wait for the end; the exit code."""
        if self._process is None:
            return 0
        self.send_signal(number)
        return self.wait()
