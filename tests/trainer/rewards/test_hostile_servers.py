"""Servers and networks at their worst: each of these has cost somebody a night."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardRejected, client, endpoint
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.plain import to_dict

pytestmark = pytest.mark.usefixtures("quick_retries")

PROMPTS = [f"prompt {i}" for i in range(40)]
RESPONSES = [f" response {i}" for i in range(40)]
EXPECTED = [stub_reward(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]

Start = Callable[[], StubRewardServer]


def settings(*urls: str, **changes: Any) -> RewardSettings:
    return RewardSettings.of(url=urls, **{"patience_s": 30.0, "chunk_size": 4, "check_order": False} | changes)


def score(wanted: RewardSettings) -> list[float]:
    with RewardClient(wanted) as open_client:
        open_client.connect()
        return open_client.score(PROMPTS, RESPONSES)


def test_an_answer_without_an_end_is_refused_before_it_fills_the_memory(
    stub_reward_server: StubRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1_000_000)
    stub_reward_server.script([{"do": "flood"}])
    with pytest.raises(RewardRejected, match="more than 1000000 bytes") as caught:
        score(settings(stub_reward_server.url))
    assert caught.value.exchange is not None
    assert caught.value.exchange.answer is not None
    assert len(caught.value.exchange.answer) == 1_000_000


def test_an_error_without_an_end_is_still_the_error_that_it_is(
    stub_reward_server: StubRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 1_000_000)
    stub_reward_server.script([{"do": "flood", "status": 503, "times": 2}])
    assert score(settings(stub_reward_server.url)) == EXPECTED


def test_an_endpoint_that_says_it_is_ready_and_never_answers_costs_its_timeout_and_no_reward(start_stub: Start) -> None:
    stuck, healthy = start_stub(), start_stub()
    stuck.script([{"do": "hang", "times": 10_000}])
    assert score(settings(stuck.url, healthy.url, request_timeout_s=1.0)) == EXPECTED
    assert sum(healthy.state["scored"].values()) == len(EXPECTED)


def test_the_endpoint_that_is_left_gets_no_more_at_once_than_before(start_stub: Start) -> None:
    dead, alive = start_stub(), start_stub()
    alive.script([{"do": "score", "delay_s": 0.1, "times": 100}])
    with RewardClient(settings(dead.url, alive.url, max_in_flight=2)) as open_client:
        open_client.connect()
        dead.kill()
        assert open_client.score(PROMPTS, RESPONSES) == EXPECTED
    assert alive.state["max_in_flight"] == 2


def test_a_retry_after_of_years_does_not_lose_the_endpoint_for_good(start_stub: Start) -> None:
    first, second = start_stub(), start_stub()
    first.script([{"do": "status", "status": 429, "headers": {"Retry-After": "1000000000"}}])
    with RewardClient(settings(first.url, second.url, patience_s=0.5)) as open_client:
        open_client.connect()
        while first.state["requests"] < 2:
            assert open_client.score(PROMPTS, RESPONSES) == EXPECTED


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2.5"}, 2.5),
        ({"Retry-After": "-1"}, 0.0),
        # The server's clock may be years off: its own `Date` is what its date is measured from.
        ({"Date": "Thu, 01 Jan 2015 00:00:00 GMT", "Retry-After": "Thu, 01 Jan 2015 00:00:07 GMT"}, 7.0),
        ({"Date": "Fri, 01 Jan 2099 00:00:00 GMT", "Retry-After": "Fri, 01 Jan 2099 00:00:07 GMT"}, 7.0),
        ({"Date": "Fri, 01 Jan 2099 00:00:00 GMT", "Retry-After": "Thu, 01 Jan 2015 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_needs_nobodys_clock_to_be_right(headers: dict[str, str], seconds: float | None) -> None:
    assert endpoint._retry_after_s(httpx.Response(429, headers=headers)) == seconds


def test_a_name_that_is_not_resolved_is_tried_again(
    stub_reward_server: StubRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve, failures = socket.getaddrinfo, iter(range(3))

    def flaky(host: Any, *arguments: Any, **named: Any) -> Any:
        if host not in ("rewards.example", b"rewards.example"):
            return resolve(host, *arguments, **named)
        if next(failures, None) is not None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1", *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    said: list[str] = []
    with RewardClient(
        settings(f"http://rewards.example:{stub_reward_server.port}"), on_wait=said.append
    ) as open_client:
        open_client.connect()
        assert open_client.score(PROMPTS, RESPONSES) == EXPECTED
    assert "name resolution" in said[0]
    assert next(failures, None) is None


def test_an_ipv6_address_is_an_endpoint() -> None:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = StubRewardServer(host="::1")
    try:
        assert server.url.startswith("http://[::1]:")
        assert score(settings(server.url)) == EXPECTED
    finally:
        server.kill()


def test_a_password_in_the_url_is_sent_and_shown_nowhere(stub_reward_server: StubRewardServer, tmp_path: Path) -> None:
    url = stub_reward_server.url.replace("http://", "http://me:pass%40word@")
    wanted = settings(url, header=("X-Key: hidden",))
    stub_reward_server.script([{"do": "status", "status": 422}])
    with pytest.raises(RewardRejected) as caught:
        score(wanted)
    assert stub_reward_server.state["headers"]["authorization"] == httpx.BasicAuth("me", "pass@word")._auth_header
    kept = [str(caught.value), caught.value.save(tmp_path).read_text(), json.dumps(to_dict(wanted))]
    for text in kept:
        assert stub_reward_server.url in text
        assert "pass" not in text
        assert "hidden" not in text


@pytest.mark.parametrize("key", ["two\nlines", "schl\u00fcssel"])
def test_a_key_that_no_header_can_hold_is_refused_before_anybody_is_asked(key: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(key)
    with pytest.raises(ConfigError, match="one line of plain ASCII"):
        RewardClient(settings("http://127.0.0.1:9", api_key_file=tmp_path / "key"))


@pytest.mark.parametrize("path", ["/readyz", "/v1/model", "/v1/rewards"])
def test_a_redirect_is_refused_wherever_it_comes_and_never_followed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    info = {"max_items": 64, "max_text_chars": 1000, "max_body_bytes": 10_000, "max_tokens": 512}
    model = {"id": "m", "revision": "r", "labels": ["POSITIVE"], "limits": info}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if request.url.path == path:
            return httpx.Response(302, headers={"Location": "https://login.example/"})
        return httpx.Response(200, json=model)

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(client, "_http_client", lambda *_: httpx.AsyncClient(transport=transport))
    with pytest.raises(RewardRejected, match=r"redirects to https://login\.example/"):
        score(settings("http://rewards.example"))
    assert asked[-1].endswith(path)
