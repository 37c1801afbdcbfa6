"""Endpoints in network namespaces of their own: packets get lost, and a cable is pulled. Linux, root and iptables."""

from collections.abc import Iterator

import pytest

from harness.machine.network import Machine, why_not
from harness.stub_reward_server import stub_reward
from plaudit.rewards import RewardClient, RewardUnavailable, source
from plaudit.rewards.settings import RewardSettings

PROMPTS = [f"prompt {i}" for i in range(400)]
EXPECTED = [stub_reward(p, p) for p in PROMPTS]


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


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
    return RewardSettings.of(url=tuple(m.server.url for m in machines), chunk_size=16, **values)


def test_a_tenth_of_all_packets_lost_and_the_others_late_loses_no_reward(machines: list[Machine]) -> None:
    for machine in machines:
        machine.lose_packets(0.1)
        machine.narrow("256kbit")
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
