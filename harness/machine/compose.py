"""A Compose project on a real Docker engine."""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from harness import processes

ROOT = Path(__file__).parents[2]
WAIT_S = 600.0
CALLER = os.getuid() or 4321
"""Whose the results are to be; root stands for somebody else, since what belongs to root shows nothing."""


def answers(*command: str) -> bool:
    """Whether the command is there and succeeds."""
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def reason_to_skip() -> str | None:
    """Why tests with an engine can't run here; None if they can."""
    if os.environ.get("PLAUDIT_COMPOSE_TEST") != "1":
        return "run it with `make compose-test`"
    if not answers("docker", "info"):
        return "no Docker engine answers"
    if not answers("docker", "compose", "version") and shutil.which("docker-compose") is None:
        return "neither `docker compose` nor docker-compose is installed"
    return None


def docker(*arguments: str) -> str:
    """What `docker` prints; it must succeed."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout.strip()


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for what a container does."""
    processes.until(condition, what, wait_s=WAIT_S)


class Project:
    """The repository's stack as a Compose project with a name of its own, which `environment` configures."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._environment = os.environ | {
            "COMPOSE_PROJECT_NAME": name,
            "UID": str(CALLER),
            "GID": str(CALLER if os.getuid() == 0 else os.getgid()),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        if not answers("docker", "buildx", "version"):
            self._environment |= {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
        self._command = ["docker", "compose"] if answers("docker", "compose", "version") else ["docker-compose"]

    def compose(self, *arguments: str, **environment: str) -> str:
        """What Compose prints; it must succeed."""
        done = subprocess.run(
            [*self._command, *arguments],
            cwd=ROOT,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout.strip()

    def containers(self, service: str) -> list[str]:
        """Ids of the service's containers."""
        return self.compose("ps", "-q", service).split()

    def exit_code(self, service: str) -> int:
        """Waits for the end of the service's only container, also of one that was stopped or began anew."""
        (container,) = (
            self.containers(service)
            or docker(
                *("ps", "-aq", "-f", f"label=com.docker.compose.project={self.name}"),
                *("-f", f"label=com.docker.compose.service={service}"),
            ).split()
        )
        return int(subprocess.run(["docker", "wait", container], capture_output=True, text=True, timeout=WAIT_S).stdout)
