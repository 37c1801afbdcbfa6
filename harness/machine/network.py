"""Servers in network namespaces of their own: cables that lose packets, delay them, can be pulled. Linux and root."""

import ipaddress
import os
import random
import shutil
import subprocess
import sys
import uuid

from harness.stub_reward_server import StubRewardServer

RATE = ["tbf", "burst", "2kb", "latency", "2s", "rate"]
STATISTIC = ["iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random"]


def why_not() -> str | None:
    """Why there can be no such machines here, if there can't."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "iptables"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    name = f"plaudit-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces can't be made here"
    inside = ["ip", "netns", "exec", name]
    needed = {
        "iptables has no statistic match here": [*STATISTIC, "--probability", "0.1", "-j", "DROP"],
        "the kernel has no tbf here": ["tc", "qdisc", "add", "dev", "lo", "root", *RATE, "1mbit"],
    }
    failed = [why for why, do in needed.items() if subprocess.run([*inside, *do], capture_output=True).returncode]
    subprocess.run(["ip", "netns", "del", name], check=True)
    return failed[0] if failed else None


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

    def narrow(self, rate: str) -> None:
        """Let so much through in a second and queue the rest, so that answers are late."""
        run("tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", *RATE, rate)

    def unplug(self) -> None:
        run("ip", "link", "set", self._cable, "down")

    def plug(self) -> None:
        run("ip", "link", "set", self._cable, "up")

    def end(self) -> None:
        self.server.kill()
        run("ip", "netns", "del", self.name)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
