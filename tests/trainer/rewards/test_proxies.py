"""Proxy variables: obeyed where they apply, never for this machine, and a clear line where one can't be used."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness.stub_reward_server import StubRewardServer, stub_reward
from plaudit.errors import ConfigError
from plaudit.rewards import RewardClient, RewardUnavailable
from plaudit.rewards.proxies import Proxy, proxy_for
from plaudit.rewards.settings import RewardSettings

NOWHERE = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A proxy that refuses everything, its URL, and what it was asked for."""
    paths: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(503, "no way")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "variables",
    [
        {"HTTP_PROXY": NOWHERE},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"NO_PROXY": "::1/128,fe80::/10,127.0.0.1", "HTTP_PROXY": NOWHERE},
        {"NO_PROXY": "[::1]:8000,10.0.0.0/8", "HTTPS_PROXY": "quic://proxy"},
        {"http_proxy": "proxy.corp:3128"},
        {"http_proxy": "http://[broken"},
    ],
    ids=str,
)
def test_a_service_on_this_machine_is_asked_directly_whatever_the_variables_say(
    variables: dict[str, str], stub_reward_server: StubRewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with RewardClient(RewardSettings.of(url=(stub_reward_server.url,), patience_s=5.0)) as client:
        client.connect()
        assert client.score(["a"], [" b"]) == [stub_reward("a", " b")]


def test_another_machine_is_asked_through_the_proxy_and_its_failure_names_the_variable(
    asked: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, paths = asked
    monkeypatch.setenv("http_proxy", proxy)
    with (
        RewardClient(RewardSettings.of(url=("http://judge.example:8000",), kind="plaudit", patience_s=0.2)) as client,
        pytest.raises(RewardUnavailable, match=rf"through the proxy {proxy} \(http_proxy\); NO_PROXY=judge.example"),
    ):
        client.connect()
    assert set(paths) == {"http://judge.example:8000/readyz"}


@pytest.mark.parametrize(
    ("url", "variables", "through"),
    [
        ("http://judge", {}, None),
        ("http://judge", {"HTTP_PROXY": "http://proxy:1"}, Proxy("http://proxy:1", "HTTP_PROXY")),
        ("https://judge", {"HTTP_PROXY": "http://proxy:1"}, None),
        ("https://judge", {"ALL_PROXY": "http://proxy:1"}, Proxy("http://proxy:1", "ALL_PROXY")),
        ("http://judge", {"HTTP_PROXY": "http://a", "http_proxy": "b:2"}, Proxy("http://b:2", "http_proxy")),
        ("http://judge", {"HTTP_PROXY": "http://proxy:1", "http_proxy": ""}, None),
        ("http://judge", {"HTTP_PROXY": "http://proxy:1", "REQUEST_METHOD": "GET"}, None),
        ("http://judge.corp:80", {"http_proxy": "http://p", "no_proxy": "corp"}, None),
        ("http://judge.corp:80", {"http_proxy": "http://p", "NO_PROXY": ".corp:80, other"}, None),
        ("http://judge.corp:80", {"http_proxy": "http://p", "no_proxy": "*.corp"}, None),
        ("http://judge.corp:80", {"http_proxy": "http://p", "no_proxy": "*"}, None),
        ("http://judge.corp:80", {"http_proxy": "http://p", "no_proxy": "corp:81"}, Proxy("http://p", "http_proxy")),
        ("http://judge.corp", {"http_proxy": "http://p", "no_proxy": "udge.corp"}, Proxy("http://p", "http_proxy")),
        ("http://10.1.2.3:8", {"http_proxy": "http://p", "no_proxy": "10.0.0.0/8"}, None),
        ("http://10.1.2.3:8", {"http_proxy": "http://p", "no_proxy": "11.0.0.0/8"}, Proxy("http://p", "http_proxy")),
        ("http://[fe80::1]:8", {"http_proxy": "http://p", "no_proxy": "fe80::/10"}, None),
        ("http://[fd00::1]:8", {"http_proxy": "http://p", "no_proxy": "[fd00::1]"}, None),
        *((f"http://{host}:8", {"http_proxy": "http://p"}, None) for host in ("localhost", "127.9.9.9", "[::1]")),
    ],
    ids=str,
)
def test_the_variables_mean_what_they_mean_to_curl(url: str, variables: dict[str, str], through: Proxy | None) -> None:
    assert proxy_for(url, variables) == through


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("socks5://127.0.0.1:9", r"ALL_PROXY=socks5://127.0.0.1:9 is a SOCKS proxy.*pip install 'httpx\[socks\]'"),
        ("quic://user:secret@proxy:9", "ALL_PROXY=proxy:9 can't be used: a proxy begins with http://"),
        ("http://[broken", "is no proxy's address; write http://HOST:PORT"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_refused_with_the_variable_and_the_way_round(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said + ".*put judge into NO_PROXY"):
        proxy_for("http://judge:8000", {"ALL_PROXY": value})
