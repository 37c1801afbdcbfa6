"""How many requests are lost when reward services are killed behind the balancer.

    python -m benchmarks.chaos.replica_kills --kills 10
    python -m benchmarks.chaos.replica_kills --kills 30 --write-delay-us 2000

Starts HAProxy (Debian's package `haproxy`) with deploy/balancer/haproxy.cfg in front of real reward services on this
machine, and callers that ask without pause for one text and for 32 in turn and repeat nothing. Kills one service after
the other with SIGKILL, each time starting it again once the balancer has noticed, and counts answers by status. A
request is lost when its caller gets anything but 200. The reward model is a tiny one unless `--model` names another, so
that there are many of them. `--balancer-config` measures another configuration. With `--write-delay-us`, Debian's
`strace` makes each write of the services take that much longer, so that more kills hit what happens between two writes.
"""

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from harness.machine.balancer import CONFIG, asking_without_pause, balancer_file, replicas_up
from harness.processes import Program, free_port, running, until
from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir

PAUSE_S = 1.0
"""How long the callers go on undisturbed before the next kill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--balancer-config", type=Path, default=CONFIG)
    parser.add_argument("--write-delay-us", type=int, default=0)
    arguments = parser.parse_args()

    port, operations = free_port(), free_port()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = arguments.model or tiny_classifier_dir(Path(directory) / "judge")
        services = [RewardService(model) for _ in range(arguments.replicas)]
        for service in services:
            stack.callback(service.kill)
            slow_writes(service, arguments.write_delay_us)
        ports = [service.port for service in services]
        file = balancer_file(Path(directory), port, operations, ports, config=arguments.balancer_config)
        stack.enter_context(running("haproxy", "-db", "-f", str(file), log=Path(directory) / "haproxy.log"))
        until(lambda: replicas_up(operations) == len(services), "all replicas")
        began = time.monotonic()
        with asking_without_pause(port, arguments.callers) as statuses:
            for kill in range(arguments.kills):
                time.sleep(PAUSE_S)
                victim = services[kill % len(services)]
                victim.kill()
                until(lambda: replicas_up(operations) == len(services) - 1, "the balancer to notice")
                victim.begin()
                victim.wait_until_ready()
                slow_writes(victim, arguments.write_delay_us)
                until(lambda: replicas_up(operations) == len(services), "the replica's return")
        lost = statuses.total() - statuses[200]
        print(
            f"{statuses.total()} requests in {time.monotonic() - began:.0f} s, {arguments.kills} kills, {lost} lost "
            f"(by status, 0 for no whole answer: {dict(statuses)})"
        )


def slow_writes(service: RewardService, microseconds: int) -> None:
    """Make each write of the running service take that much longer, until it ends."""
    if microseconds:
        delay = f"inject=write:delay_exit={microseconds}"
        Program("strace", "-fqq", "-o/dev/null", "-etrace=write", "-e", delay, "-p", str(service.pid)).begin()


if __name__ == "__main__":
    main()
