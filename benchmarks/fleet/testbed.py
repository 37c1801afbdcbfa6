"""Reward services behind the deployment's own balancer, all on this machine, and what they use of it."""

import csv
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from benchmarks.fleet.replica import BATCH_S, TOKEN_S
from harness.machine.balancer import CONFIG, STATISTICS, balancer_file, replicas_up
from harness.processes import Program, free_port, running
from harness.reward_service import RewardService

Kind = Literal["judge", "sleep", "null"]
JUDGE = "imdb-distilbert-mini"
LABEL = "POSITIVE"


@dataclass(frozen=True)
class Model:
    """What the replicas serve: the embedded judge, a model that sleeps, or one that costs nothing."""

    kind: Kind = "sleep"
    batch_s: float = 0.0
    token_s: float = 0.0

    def service(self, directory: Path | str = JUDGE, *flags: str) -> RewardService:
        """A replica of its own process, ready. The directory is a model's."""
        if self.kind == "judge":
            return RewardService(directory, "--label", LABEL, *flags)
        times = {BATCH_S: str(self.batch_s), TOKEN_S: str(self.token_s)} if self.kind == "sleep" else {}
        before = {name: os.environ.get(name) for name in times}
        os.environ.update(times)
        try:
            return RewardService(directory, "--label", LABEL, *flags, program="benchmarks.fleet.replica")
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]


@dataclass
class Fleet:
    """Replicas and their balancer."""

    url: str
    services: list[RewardService]
    balancer: Program
    operations: int
    keys: list[str]
    computes: bool
    """Whether the model uses the CPU."""

    def processes(self) -> dict[str, psutil.Process]:
        """Those that run, by name. The balancer is one process."""
        found = {
            f"replica {number}": psutil.Process(service.pid)
            for number, service in enumerate(self.services)
            if service.running
        }
        return found | {"balancer": psutil.Process(self.balancer.pid)}

    def up(self) -> int:
        """Replicas that the balancer sends requests to."""
        return replicas_up(self.operations)

    def wait_for(self, replicas: int) -> None:
        """Returns when the balancer sends requests to so many replicas."""
        self.balancer.until(lambda: self.up() == replicas, f"{replicas} replicas behind the balancer", wait_s=60.0)

    def statistics(self) -> list[dict[str, str]]:
        """The balancer's own: a row for each frontend, backend and server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.operations}{STATISTICS}", timeout=10) as answer:
            return list(csv.DictReader(answer.read().decode().removeprefix("# ").splitlines()))


@contextmanager
def fleet(
    model: Model,
    replicas: int,
    *,
    trainers: int,
    flags: Sequence[str] = (),
    directory: Path | str = JUDGE,
    models: Mapping[int, Model] | None = None,
    config: Path = CONFIG,
) -> Iterator[Fleet]:
    """So many replicas behind HAProxy with deploy/balancer/haproxy.cfg, and a key for each trainer.

    `models` gives some replicas, by number, another model. `config` is another file in place of the deployment's.
    """
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        keys = [f"trainer-{number:04d}-key" for number in range(trainers)]
        key_file = Path(place) / "keys"
        key_file.write_text("".join(f"{key}\n" for key in keys))
        key_file.chmod(0o600)
        services = []
        for number in range(replicas):
            served = (models or {}).get(number, model)
            service = served.service(directory, "--api-key-file", str(key_file), *flags)
            stack.callback(service.kill)
            services.append(service)
        port, operations = free_port(), free_port()
        file = balancer_file(Path(place), port, operations, [service.port for service in services], config=config)
        balancer = stack.enter_context(running("haproxy", "-db", "-f", str(file), log=Path(place) / "haproxy.log"))
        running_fleet = Fleet(f"http://127.0.0.1:{port}", services, balancer, operations, keys, model.kind == "judge")
        running_fleet.wait_for(replicas)
        yield running_fleet
