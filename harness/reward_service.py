"""The real reward service in a process of its own, to be killed and restarted by tests."""

import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from harness.processes import Program


def python_path(tree: Path) -> str:
    """Where Python finds the code of a checkout."""
    return os.pathsep.join((str(tree / "services"), str(tree / "trainer")))


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


class RewardService(Program):
    """`python -m plaudit.reward_service` on a port that stays the same over restarts; ready when it is made.

    `wrapper` is a command that runs it, such as taskset; `program` is another module to run in place of the service's.
    """

    def __init__(
        self,
        model: Path | str,
        *flags: str,
        api_key: str | None = None,
        wrapper: tuple[str, ...] = (),
        program: str = "plaudit.reward_service",
    ) -> None:
        super().__init__(environment=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        if api_key is not None:
            self.environment["REWARD_API_KEY"] = api_key
        self._before = [*wrapper, sys.executable, "-m", program, "--threads", "1"]
        self._model = model
        self._flags = flags
        self.port = 0
        self.announced: dict[str, Any] = {}
        self.begin()
        self.wait_until_ready()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def run_code_of(self, tree: Path | None) -> None:
        """From the next `begin` on, run the code of another checkout; None is this one."""
        self.environment.pop("PYTHONPATH", None)
        if tree is not None:
            self.environment["PYTHONPATH"] = python_path(tree)
        elif "PYTHONPATH" in os.environ:
            self.environment["PYTHONPATH"] = os.environ["PYTHONPATH"]

    def begin(self, model: Path | None = None) -> None:
        """Start the process and don't wait for it."""
        self.command = [*self._before, "--model", str(model or self._model), "--port", str(self.port), *self._flags]
        super().begin()

    def wait_until_ready(self) -> None:
        """Returns when it answers."""
        self.announced = self.wait_for_event("ready")
        self.port = int(self.announced["url"].rpartition(":")[2])
