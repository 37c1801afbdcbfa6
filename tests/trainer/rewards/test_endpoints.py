"""Several endpoints, several rewards, functions, headers and TLS."""

import asyncio
import gc
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardRejected, RewardUnavailable, source
from plaudit.rewards.settings import RewardComponent, RewardSettings

pytestmark = pytest.mark.usefixtures("quick_retries")

PROMPTS = [f"prompt {i}" for i in range(40)]
RESPONSES = [f" response {i}" for i in range(40)]
EXPECTED = [stub_reward(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
HERE = __name__

Start = Callable[[], StubRewardServer]


def settings(*servers: StubRewardServer, **changes: object) -> RewardSettings:
    values = {"patience_s": 30.0, "request_timeout_s": 20.0, "chunk_size": 4, "check_order": False} | changes
    return RewardSettings.of(url=tuple(server.url for server in servers), **values)


def test_work_goes_to_the_endpoint_with_the_least_outstanding(start_stub: Start) -> None:
    slow, fast = start_stub(), start_stub()
    slow.script([{"do": "score", "delay_s": 2.0, "times": 100}])
    with RewardClient(settings(slow, fast, max_in_flight=1)) as client:
        client.connect()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert slow.state["requests"] < fast.state["requests"]
    assert slow.state["requests"] + fast.state["requests"] == 10


def test_a_dead_endpoint_is_set_aside_and_taken_up_again_when_it_is_back(start_stub: Start) -> None:
    first, second = start_stub(), start_stub()
    with RewardClient(settings(first, second)) as client:
        client.connect()
        first.kill()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert second.state["requests"] == 10
        first.start()
        while not first.state["requests"]:
            assert client.score(PROMPTS, RESPONSES) == EXPECTED
        assert client.score(PROMPTS, RESPONSES) == EXPECTED


def test_a_chunk_moves_on_at_once_when_its_endpoint_fails(start_stub: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WAIT_INITIAL_S", 30.0)
    first, second = start_stub(), start_stub()
    for server in (first, second):
        server.script([{"do": "status", "status": 503, "headers": {"Retry-After": "60"}, "when": "prompt 0"}])
    second.script([])
    said: list[str] = []
    with RewardClient(settings(first, second), on_wait=said.append) as client:
        client.connect()
        started = time.monotonic()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert time.monotonic() - started < 30, "it waited for the endpoint that had failed"
    assert said == []


def test_one_endpoint_may_be_down_at_the_start_and_join_later(start_stub: Start) -> None:
    first, second = start_stub(), start_stub()
    first.kill()
    with RewardClient(settings(first, second)) as client:
        client.connect()
        first.start()
        while not first.state["requests"]:
            assert client.score(PROMPTS, RESPONSES) == EXPECTED


def test_an_endpoint_that_joins_with_another_model_is_refused(start_stub: Start) -> None:
    first, second = start_stub(), start_stub()
    second.set(revision="sha256:other")
    with RewardClient(settings(first, second)) as client, pytest.raises(RewardRejected, match="sha256:other"):
        client.connect()


def test_all_endpoints_dead_for_longer_than_the_patience_is_unavailable(start_stub: Start) -> None:
    servers = [start_stub(), start_stub()]
    with RewardClient(settings(*servers, patience_s=0.5)) as client:
        client.connect()
        for server in servers:
            server.kill()
        with pytest.raises(RewardUnavailable):
            client.score(PROMPTS, RESPONSES)


def test_repeated_requests_go_out_one_at_a_time_while_the_endpoint_fails(stub_reward_server: StubRewardServer) -> None:
    delay_s, patience_s = 0.1, 1.5
    with RewardClient(settings(stub_reward_server, patience_s=patience_s)) as client:
        client.connect()
        stub_reward_server.script([{"do": "status", "status": 503, "delay_s": delay_s, "times": 1000}])
        with pytest.raises(RewardUnavailable):
            client.score(PROMPTS[:32], RESPONSES[:32])
    first_tries = 8
    assert stub_reward_server.state["requests"] <= first_tries + patience_s / delay_s + 1


def test_an_endpoint_is_set_aside_for_a_growing_time_however_long_it_has_been_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert [source.pause_after(failures) for failures in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert source.pause_after(1_000_000) == 30.0


def test_a_slow_chunk_is_hedged_and_the_faster_answer_counts(start_stub: Start) -> None:
    stuck, healthy = start_stub(), start_stub()
    stuck.script([{"do": "hang", "when": "prompt", "times": 1}])
    with RewardClient(settings(stuck, healthy, hedge_after_s=0.2, request_timeout_s=60.0)) as client:
        client.connect()
        started = time.monotonic()
        assert client.score(PROMPTS, RESPONSES) == EXPECTED
    assert time.monotonic() - started < 60, "it waited for the endpoint that hung"
    assert stuck.state["requests"] + healthy.state["requests"] >= 11


def test_a_hedged_chunk_survives_the_failure_of_the_faster_endpoint(start_stub: Start) -> None:
    slow, failing = start_stub(), start_stub()
    slow.script([{"do": "score", "delay_s": 1.0, "times": 9}])
    failing.script([{"do": "status", "status": 503, "times": 9}])
    with RewardClient(settings(slow, failing, hedge_after_s=0.2)) as client:
        client.connect()
        assert client.score(PROMPTS[:4], RESPONSES[:4]) == EXPECTED[:4]


def test_rewards_in_another_order_than_the_texts_are_noticed_at_the_start(
    stub_reward_server: StubRewardServer,
) -> None:
    stub_reward_server.script([{"do": "reversed", "times": 100, "probes": True}])
    with (
        RewardClient(settings(stub_reward_server, check_order=True)) as client,
        pytest.raises(RewardRejected, match="another order than the texts"),
    ):
        client.connect()


def test_a_server_that_keeps_the_order_passes_the_check(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server, check_order=True)) as client:
        client.connect()
    state = stub_reward_server.state
    assert (state["probes"], state["requests"]) == (5, 0)


def test_a_server_that_gives_opposites_the_same_reward_is_worth_a_warning(
    stub_reward_server: StubRewardServer, caplog: pytest.LogCaptureFixture
) -> None:
    stub_reward_server.script([{"do": "literal", "text": "0.5", "times": 5, "probes": True}])
    with RewardClient(settings(stub_reward_server, check_order=True)) as client:
        client.connect()
    assert "gives 'I loved it.' and 'I hated it.' the same reward, 0.5" in caplog.text
    caplog.clear()
    stub_reward_server.reset()
    with RewardClient(settings(stub_reward_server, check_order=True)) as client:
        client.connect()
    assert caplog.text == ""


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


async def length_async(prompts: list[str], responses: list[str]) -> list[int]:
    await asyncio.sleep(0)
    return [len(response) for response in responses]


def one_short(prompts: list[str], responses: list[str]) -> list[float]:
    return length(prompts, responses)[1:]


def not_a_number(prompts: list[str], responses: list[str]) -> list[float]:
    return [float("nan")] * len(responses)


def nothing(prompts: list[str], responses: list[str]) -> list[float | None]:
    return [None] * len(responses)


def raises(prompts: list[str], responses: list[str]) -> list[float]:
    raise KeyError("lost")


def raises_stop_iteration(prompts: list[str], responses: list[str]) -> list[float]:
    return [next(iter([]))]


def exits(prompts: list[str], responses: list[str]) -> list[float]:
    raise SystemExit(3)


def gives_text(prompts: list[str], responses: list[str]) -> str:
    return "1234"


def too_large(prompts: list[str], responses: list[str]) -> list[int]:
    return [10**400] * len(responses)


def breaks_off(prompts: list[str], responses: list[str]) -> Iterator[float]:
    yield 1.0
    raise KeyError("lost")


never = threading.Event()


def hangs(prompts: list[str], responses: list[str]) -> list[float]:
    never.wait()
    return []


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "my_rewards", sys.modules[HERE])


@pytest.mark.parametrize("name", ["length", "length_async"])
def test_a_function_is_a_reward_sync_or_async(name: str) -> None:
    with RewardClient(RewardSettings.of(function=f"my_rewards:{name}", chunk_size=7)) as client:
        info = client.connect()
        assert client.score(PROMPTS, RESPONSES) == [float(len(response)) for response in RESPONSES]
    assert info.revision.startswith("function:")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_short", "got 4 texts and gave 3 numbers"),
        ("not_a_number", "not finite"),
        ("nothing", "no list of numbers"),
        ("raises", "KeyError: 'lost'"),
        ("raises_stop_iteration", "StopIteration"),
        ("exits", "SystemExit: 3"),
        ("gives_text", "it gave text"),
        ("too_large", "no list of numbers"),
        ("breaks_off", "no list of numbers: 'lost'"),
    ],
)
def test_a_functions_failure_is_never_a_number(name: str, message: str) -> None:
    with RewardClient(RewardSettings.of(function=f"my_rewards:{name}")) as client:
        client.connect()
        with pytest.raises(RewardRejected, match=message):
            client.score(PROMPTS[:4], RESPONSES[:4])


def test_a_function_that_hangs_is_unavailable_after_the_timeout() -> None:
    with RewardClient(RewardSettings.of(function="my_rewards:hangs", request_timeout_s=0.2)) as client:
        client.connect()
        with pytest.raises(RewardUnavailable, match=r"took more than 0\.2 s"):
            client.score(PROMPTS[:4], RESPONSES[:4])
    never.set()


closing = (threading.Event(), threading.Event())
"""The function has been called; `close` has begun."""


async def starts_a_task_while_the_client_closes(prompts: list[str], responses: list[str]) -> list[float]:
    called, closes = closing
    called.set()
    closes.wait()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 0)
    return [0.0] * len(responses)


def test_closing_leaves_the_tasks_of_a_library_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One cancelled before it began would be a coroutine that was never awaited, found when the collector comes by."""
    called, closes = closing
    client = RewardClient(RewardSettings.of(function="my_rewards:starts_a_task_while_the_client_closes"))
    client.connect()
    future = client.submit(PROMPTS, RESPONSES)
    called.wait()
    schedule = client._loop.call_soon_threadsafe

    def scheduled(*arguments: Any, **options: Any) -> asyncio.Handle:
        handle = schedule(*arguments, **options)
        closes.set()
        return handle

    monkeypatch.setattr(client._loop, "call_soon_threadsafe", scheduled)
    client.close()
    assert future.cancelled()
    gc.collect()


async def leaves_a_task_behind(prompts: list[str], responses: list[str]) -> list[float]:
    left.append(asyncio.create_task(asyncio.Event().wait()))
    return [0.0] * len(responses)


left: list[asyncio.Task[Any]] = []


def test_closing_ends_the_tasks_that_a_function_left_behind() -> None:
    with RewardClient(RewardSettings.of(function="my_rewards:leaves_a_task_behind")) as client:
        client.connect()
        client.score(PROMPTS, RESPONSES)
    assert left.pop().cancelled()


@pytest.mark.parametrize("name", ["my_rewards:missing", "no_such_module:f", "my_rewards:EXPECTED"])
def test_a_function_that_is_not_there_is_refused_when_built(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        RewardClient(RewardSettings.of(function=name))


def test_several_rewards_are_weighted_and_each_is_told_by_name(start_stub: Start) -> None:
    first, second = start_stub(), start_stub()
    mixed = RewardSettings(
        (
            RewardComponent(name="sentiment", url=(first.url,), label="POSITIVE", weight=2.0),
            RewardComponent(name="length", function="my_rewards:length", weight=-0.5),
            RewardComponent(name="negative", url=(second.url,), label="NEGATIVE", weight=3.0),
        ),
        patience_s=30.0,
    )
    with RewardClient(mixed) as client:
        client.connect()
        scores = client.submit_components(PROMPTS, RESPONSES).result(timeout=60)
        assert client.revision.startswith("sentiment=sha256:stub, length=function:")
    lengths = [float(len(response)) for response in RESPONSES]
    assert scores.components == {"sentiment": EXPECTED, "length": lengths, "negative": EXPECTED}
    assert scores.totals == pytest.approx([2 * e - 0.5 * n + 3 * e for e, n in zip(EXPECTED, lengths, strict=True)])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (RewardComponent(name="first", function="a:b"), "different names, not first, first"),
        (RewardComponent(name="empty"), "'empty' needs either url or function"),
    ],
)
def test_a_second_reward_needs_a_name_and_somebody_to_ask(second: RewardComponent, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardSettings((RewardComponent(name="first", url=("http://rewards",)), second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ("http://rewards",), "function": "a:b"}, "both url and function"),
        ({"url": ("127.0.0.1:8000",)}, "http://"),
        ({"url": ("http://",)}, "must name a host"),
        ({"url": ("http://rewards:80000",)}, "a port from 1 to 65535"),
        ({"url": ("http://rewards/?key=1",)}, "must end with its path"),
        ({"header": ("X-Tenant: blue\r\nX-More: 1",)}, "plain ASCII"),
        ({"function": "no_colon"}, "module:name"),
        ({"header": ("novalue",)}, "X-Tenant: blue"),
        ({"weight": float("nan")}, "finite"),
        ({"hedge_after_s": 99.0}, "request_timeout_s=60"),
        ({"max_in_flight": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_work_fail_when_built(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardSettings.of(**changes)


def test_an_https_endpoint_is_trusted_by_its_own_authority_and_not_otherwise(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*openssl, *names, "-keyout", key, "-out", certificate], capture_output=True, check=True)
    server = StubRewardServer(certificate, key)
    try:
        with RewardClient(settings(server, ca_file=certificate)) as client:
            client.connect()
            assert client.score(PROMPTS, RESPONSES) == EXPECTED
        with (
            RewardClient(settings(server)) as client,
            pytest.raises(RewardRejected, match="not trusted"),
        ):
            client.connect()
        with pytest.raises(ConfigError, match="missing"):
            RewardClient(settings(server, ca_file=tmp_path / "missing.pem"))
    finally:
        server.kill()


def test_custom_headers_are_sent(stub_reward_server: StubRewardServer) -> None:
    with RewardClient(settings(stub_reward_server, header=("X-Tenant: blue", "X-Empty:"))) as client:
        client.connect()
    headers = stub_reward_server.state["headers"]
    assert (headers["x-tenant"], headers["x-empty"]) == ("blue", "")


def test_every_text_is_scored_once_when_nothing_fails(start_stub: Start) -> None:
    servers = [start_stub() for _ in range(3)]
    with RewardClient(settings(*servers)) as client:
        client.connect()
        client.score(PROMPTS, RESPONSES)
    scored = Counter[str]()
    for server in servers:
        scored.update(server.state["scored"])
    assert scored == Counter(f"{p}|{r}" for p, r in zip(PROMPTS, RESPONSES, strict=True))
