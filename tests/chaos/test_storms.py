"""Servers that are killed, restarted and misbehave at random while thousands of texts are scored.

Every text has a reward that only the stub can compute, so whatever is lost, invented, repeated or exchanged shows.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.reward_service import RewardService
from harness.stub_reward_server import StubRewardServer, stub_reward
from harness.tiny_models import tiny_classifier_dir
from plaudit.rewards import RewardClient, RewardUnavailable, source
from plaudit.rewards.settings import RewardSettings

pytestmark = pytest.mark.slow

PASSING: list[dict[str, Any]] = [
    *({"do": "status", "status": status} for status in (408, 425, 429, 500, 502, 503, 504)),
    {"do": "status", "status": 429, "headers": {"Retry-After": "0.05"}},
    {"do": "score", "delay_s": 0.05},
    {"do": "hang"},
    {"do": "hang", "after": 30},
    {"do": "reset"},
    {"do": "cut"},
    {"do": "truncated_gzip"},
    {"do": "literal", "text": "[1, 2"},
]

Start = Callable[[], StubRewardServer]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WAIT_INITIAL_S", 0.01)
    monkeypatch.setattr(source, "WAIT_MAX_S", 0.2)
    monkeypatch.setattr(source, "WAIT_JITTER_S", 0.05)


class Killer:
    """Kills the servers in turn and starts each again, until told to stop; one is always up if there are several."""

    def __init__(self, servers: list[Any], pause_s: float = 0.3) -> None:
        self.kills = 0
        self._servers = servers
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(self._pause_s):
            server = self._servers[self.kills % len(self._servers)]
            server.kill()
            self.kills += 1
            server.start()

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_every_passing_trouble_loses_and_invents_nothing(start_stub: Start, seed: int) -> None:
    rng = random.Random(seed)
    servers = [start_stub() for _ in range(2)]
    for server in servers:
        server.script(rng.choices(PASSING, k=40))
    prompts = [f"prompt {seed} {i}" for i in range(2000)]
    responses = [f" response {rng.random()}" for _ in prompts]
    urls = tuple(server.url for server in servers)
    settings = RewardSettings.of(url=urls, patience_s=120.0, request_timeout_s=1.5, chunk_size=16, hedge_after_s=1.0)
    with RewardClient(settings) as client:
        client.connect()
        futures = [client.submit(prompts[i : i + 100], responses[i : i + 100]) for i in range(0, 2000, 100)]
        rewards = [reward for future in futures for reward in future.result(timeout=250)]
    assert rewards == [stub_reward(p, r) for p, r in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize("count", [1, 2])
def test_servers_that_are_killed_under_load_and_come_back_lose_and_invent_nothing(
    start_stub: Start, count: int
) -> None:
    servers = [start_stub() for _ in range(count)]
    settings = RewardSettings.of(url=tuple(s.url for s in servers), patience_s=120.0, chunk_size=8)
    with RewardClient(settings) as client, Killer(servers) as killer:
        client.connect()
        step = 0
        while killer.kills < 6:
            prompts = [f"prompt {step} {i}" for i in range(64)]
            assert client.score(prompts, prompts) == [stub_reward(p, p) for p in prompts]
            step += 1


def test_both_killed_for_longer_than_the_patience_is_unavailable_and_never_a_number(start_stub: Start) -> None:
    servers = [start_stub(), start_stub()]
    settings = RewardSettings.of(url=tuple(s.url for s in servers), patience_s=1.0)
    with RewardClient(settings) as client:
        client.connect()
        for server in servers:
            server.kill()
        with pytest.raises(RewardUnavailable, match="connection"):
            client.score(["a"], ["b"])
        for server in servers:
            server.start()
        assert client.score(["a"], ["b"]) == [stub_reward("a", "b")]


@pytest.mark.timeout(900)  # it imports torch twice, and the machine may be busy
def test_the_real_service_killed_under_load_and_restarted_gives_the_same_rewards(tmp_path: Path) -> None:
    prompts = [f"the movie number {i}" for i in range(256)]
    responses = [" was wonderful" if i % 3 else " was terrible and boring" for i in range(256)]
    service = RewardService(tiny_classifier_dir(tmp_path / "model"))
    try:
        with RewardClient(
            RewardSettings.of(url=(service.url,), label="POSITIVE", patience_s=600.0, chunk_size=4)
        ) as client:
            client.connect()
            undisturbed = client.score(prompts, responses)
            waiting = client.submit(prompts, responses)
            service.kill()
            while waiting.done():  # all was answered before the kill
                service.begin()
                service.wait_until_ready()
                waiting = client.submit(prompts, responses)
                service.kill()
            service.begin()
            assert waiting.result(timeout=700) == pytest.approx(undisturbed, abs=1e-4)
    finally:
        service.kill()
