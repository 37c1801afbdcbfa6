"""Endpoints in network namespaces of their own: packets get lost, and a cable is pulled. Linux, root and iptables."""

import ipaddress
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from tests.support.stub_reward_server import StubRewardServer, stub_reward
from trainer.config import RewardSettings
from trainer.reward_client import RewardClient, RewardUnavailable, source

PROMPTS = [f"prompt {i}" for i in range(400)]
EXPECTED = [stub_reward(p, p) for p in PROMPTS]


def missing() -> str | None:
    """Why these tests can't run here, if they can't."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "iptables"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    name = f"plaudit-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces can't be made here"
    rule = [*STATISTIC, "--probability", "0.1", "-j", "DROP"]
    dropped = subprocess.run(["ip", "netns", "exec", name, *rule], capture_output=True).returncode
    subprocess.run(["ip", "netns", "del", name], check=True)
    return "iptables has no statistic match here" if dropped else None


STATISTIC = ["iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random"]
WHY_NOT = missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class Machine:
    """A namespace with a server in it, and the cable to it."""

    def __init__(self) -> None:
        self.name = f"plaudit-{uuid.uuid4().hex[:6]}"
        self._cable = f"pl{uuid.uuid4().hex[:8]}"
        # A range kept for benchmarks, which no real network uses; any four addresses of it, since others may test too.
        network = ipaddress.IPv4Address("198.18.0.0") + 4 * random.SystemRandom().randrange(2**15)
        near, far = str(network + 1), str(network + 2)
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "addr", "add", f"{near}/30", "dev", self._cable)
        run("ip", "link", "set", self._cable, "up")
        run("ip", "-n", self.name, "addr", "add", f"{far}/30", "dev", "eth0")
        run("ip", "-n", self.name, "link", "set", "eth0", "up")
        self.server = StubRewardServer(host=far, wrapper=("ip", "netns", "exec", self.name))

    def lose_packets(self, share: float) -> None:
        run("ip", "netns", "exec", self.name, *STATISTIC, "--probability", str(share), "-j", "DROP")

    def unplug(self) -> None:
        run("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        run("ip", "link", "set", self._cable, "up")

    def end(self) -> None:
        self.server.kill()
        run("ip", "netns", "del", self.name)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    both = [Machine(), Machine()]
    yield both
    for machine in both:
        machine.end()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WAIT_MAX_S", 0.5)


def settings(machines: list[Machine], **changes: float) -> RewardSettings:
    values = {"patience_s": 120.0, "request_timeout_s": 3.0, "connect_timeout_s": 1.0} | changes
    return RewardSettings(url=tuple(m.server.url for m in machines), chunk_size=16, **values)  # type: ignore[arg-type]


def test_a_tenth_of_all_packets_lost_loses_no_reward(machines: list[Machine]) -> None:
    for machine in machines:
        machine.lose_packets(0.1)
        machine.server.script([{"do": "score", "delay_s": 0.05, "times": 1000}])
    with RewardClient(settings(machines)) as client:
        client.connect()
        assert client.score(PROMPTS, PROMPTS) == EXPECTED


def test_with_one_cable_pulled_in_mid_run_the_other_endpoint_goes_on(machines: list[Machine]) -> None:
    for machine in machines:
        machine.server.script([{"do": "score", "delay_s": 0.1, "times": 1000}])
    with RewardClient(settings(machines)) as client:
        client.connect()
        waiting = client.submit(PROMPTS, PROMPTS)
        machines[0].unplug()
        assert waiting.result(timeout=120) == EXPECTED
        machines[0].plug()
        assert client.score(PROMPTS, PROMPTS) == EXPECTED


def test_with_every_cable_pulled_for_longer_than_the_patience_the_wait_ends(machines: list[Machine]) -> None:
    with RewardClient(settings(machines, patience_s=2.0, request_timeout_s=1.0)) as client:
        client.connect()
        for machine in machines:
            machine.unplug()
        with pytest.raises(RewardUnavailable):
            client.score(PROMPTS, PROMPTS)
        for machine in machines:
            machine.plug()
        assert client.score(PROMPTS, PROMPTS) == EXPECTED
