"""HAProxy with the deployment's own file in front of real services that are killed (Debian's package `haproxy`)."""

import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.machine.balancer import asking_without_pause, balancer_file, replicas_up
from harness.processes import free_port, running, until
from harness.reward_service import RewardService
from harness.tiny_models import tiny_classifier_dir

pytestmark = [
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="not installed: haproxy"),
    pytest.mark.timeout(900),
]


def more_answers(statuses: Counter[int], more: int = 200) -> None:
    enough = statuses.total() + more
    until(lambda: statuses.total() >= enough, f"{more} answers")


def test_replicas_that_are_killed_under_load_cost_no_request(tmp_path: Path) -> None:
    model = tiny_classifier_dir(tmp_path / "judge")
    port, operations = free_port(), free_port()
    with ExitStack() as stack:
        services = [RewardService(model) for _ in range(2)]
        for service in services:
            stack.callback(service.kill)
        file = balancer_file(tmp_path, port, operations, [service.port for service in services])
        stack.enter_context(running("haproxy", "-db", "-f", str(file), log=tmp_path / "haproxy.log"))
        until(lambda: replicas_up(operations) == 2, "both replicas")

        with asking_without_pause(port) as statuses:
            for victim in services:
                more_answers(statuses)
                victim.kill()
                until(lambda: replicas_up(operations) == 1, "the balancer to notice")
                more_answers(statuses)
                victim.begin()
                victim.wait_until_ready()
                until(lambda: replicas_up(operations) == 2, "the replica's return")
    assert set(statuses) == {200}
