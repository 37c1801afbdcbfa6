"""Requests that two servers would read differently, connections that send nothing, and more of them than files."""

import asyncio
import contextlib
import json
import re
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from fastapi import FastAPI

from harness.processes import until
from harness.scorers import FakeScorer
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http import body
from plaudit.reward_service.http import connection as connection_module
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.server import OTHER_FILES, Hooks, LogRateLimit, Server, connections_allowed
from plaudit.reward_service.http.service import ServiceLimits

BODY = b'{"items": [{"prompt": "ab", "response": "cde"}], "label": "LENGTH"}'
KEY = b"Authorization: Bearer key\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)


@contextmanager
def serving(scorer: FakeScorer | None = None, max_connections: int = 1000, **options: object) -> Iterator[int]:
    """The real server over a fake model, on an event loop in a thread; gives its port."""
    engine = Engine(scorer or FakeScorer(), batch_tokens=512, max_queue_tokens=100_000).start()
    try:
        with listening(create_app(engine, **options), max_connections) as port:  # type: ignore[arg-type]
            yield port
    finally:
        engine.close()


@contextmanager
def listening(app: FastAPI, max_connections: int = 1000) -> Iterator[int]:
    """The real server of `app`, on an event loop in a thread; gives its port."""
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def reload() -> None: ...

    server = Server(app, 600.0, Hooks(ready.set, reload, lambda event, **_: None), max_connections=max_connections)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listener])))
        thread.start()
        assert ready.wait(30)
        try:
            yield listener.getsockname()[1]
        finally:
            server._stop_at = 0.0
            server.should_exit = True
            thread.join(30)
            loop.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(api_keys=["key"]) as number:
        yield number


def answers_to(port: int, sent: bytes) -> list[bytes]:
    """The answers until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        return rest_of(connection)


def rest_of(connection: socket.socket) -> list[bytes]:
    """The answers until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return re.split(rb"HTTP/1\.1 (?=\d{3} )", received)[1:]


def statuses(port: int, sent: bytes) -> list[int]:
    return [int(answer[:3]) for answer in answers_to(port, sent)]


def request(*headers: bytes, body: bytes = b"", method: bytes = b"POST", version: bytes = b"1.1") -> bytes:
    if not any(header.startswith(b"Connection") for header in headers):
        headers = (*headers, b"Connection: close")
    return b"%s /v1/rewards HTTP/%s\r\n%s\r\n%s" % (method, version, b"".join(h + b"\r\n" for h in headers), body)


INNER = b"GET /v1/model HTTP/1.1\r\nHost: x\r\n%s\r\n" % KEY
LENGTH = b"Content-Length: %d" % len(BODY)
JSON = b"Content-Type: application/json"
AUTH = KEY.strip()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (request(b"Host: x", JSON, AUTH, LENGTH, body=BODY), 200),
        (request(b"Host: x", JSON, AUTH, b"Connection: Upgrade", b"Upgrade: h2c", LENGTH, body=BODY), 400),
        (
            request(b"Host: x", AUTH, b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 99", body=INNER),
            400,
        ),
        (request(b"Host: x", JSON, AUTH, b"Transfer-Encoding: chunked", body=CHUNKED + b"\r\n"), 200),
        (request(b"Host: x", JSON, b"Transfer-Encoding: chunked", body=CHUNKED + KEY + b"\r\n"), 401),
        (request(b"Host: x", JSON, AUTH, b"Transfer-Encoding: gzip, chunked", body=CHUNKED + b"\r\n"), 501),
        (request(b"Host: x", JSON, AUTH, b"Transfer-Encoding: chunked", version=b"1.0", body=CHUNKED + b"\r\n"), 400),
        (request(b"Host: x", JSON, AUTH, LENGTH, b"Transfer-Encoding: chunked", body=CHUNKED + b"\r\n"), 400),
        (request(b"Host: x", JSON, AUTH, LENGTH, LENGTH, body=BODY), 400),
        (request(b"Host: x", JSON, AUTH, b"Transfer-Encoding: chunked", body=b"5\r\nhello, and more\r\n"), 400),
        (request(b"Host: x", JSON, AUTH, b"Transfer-Encoding: chunked", b"Expect: 100-continue", body=b"-5\r\n"), 400),
        (request(b"Host: x", JSON, AUTH, LENGTH, version=b"2.0", body=BODY), 400),
        (request(b"Host: x", JSON, AUTH, LENGTH, version=b"0.9", body=BODY), 400),
        (request(b"Host:\t x \t", JSON, AUTH, LENGTH, body=BODY), 200),
        (request(JSON, AUTH, LENGTH, body=BODY), 400),
        (request(b"Host: x", b"Host: y", JSON, AUTH, LENGTH, body=BODY), 400),
        (request(b"Host: x y", JSON, AUTH, LENGTH, body=BODY), 400),
        (request(b"Host: [::1]:8000", JSON, AUTH, LENGTH, body=BODY), 200),
        (request(JSON, AUTH, LENGTH, body=BODY, version=b"1.0"), 200),
        (request(b"Host: x", JSON, AUTH, AUTH, LENGTH, body=BODY), 401),
        (request(b"Host: x", JSON, AUTH, b"Authorization: Bearer no", LENGTH, body=BODY), 401),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_one_request_has_one_answer_and_what_is_ambiguous_is_refused(port: int, sent: bytes, expected: int) -> None:
    assert statuses(port, sent) == [expected]
    if expected in (400, 501):
        assert [int(answer[:3]) for answer in answers_to(port, sent + INNER)] == [expected], "and closed"


def test_an_upgrade_without_a_body_is_not_taken_and_nothing_behind_it_is_a_request(port: int) -> None:
    upgrade = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n"
    assert [int(answer[:3]) for answer in answers_to(port, upgrade + INNER)] == [200]


@pytest.mark.parametrize(
    "refused",
    [
        b"nonsense\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        request(b"Host: x", JSON, b"Transfer-Encoding: chunked", body=b"no size\r\n"),
    ],
)
def test_requests_are_answered_before_what_is_refused_behind_them(refused: bytes) -> None:
    scorer = FakeScorer(held=True)
    with serving(scorer) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        kept = request(b"Host: x", b"Connection: keep-alive", JSON, LENGTH, body=BODY)
        connection.sendall(kept + kept + refused + INNER)
        assert scorer.entered.acquire(timeout=30)
        scorer.open()
        assert [int(answer[:3]) for answer in rest_of(connection)] == [200, 200, 400]


def test_an_answer_leaves_in_one_write_so_that_a_killed_service_leaves_no_half_of_one(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []

    class Recorded:
        def __init__(self, transport: asyncio.Transport) -> None:
            self.transport = transport

        def write(self, data: bytes) -> None:
            written.append(data)
            self.transport.write(data)

        def __getattr__(self, name: str) -> object:
            return getattr(self.transport, name)

    made = connection_module.Connection.connection_made
    monkeypatch.setattr(
        connection_module.Connection,
        "connection_made",
        lambda self, transport: made(self, Recorded(transport)),  # type: ignore[arg-type]
    )
    requests = (
        request(b"Host: x", b"Connection: keep-alive", JSON, AUTH, LENGTH, b"Expect: 100-continue", body=BODY)
        + b"HEAD /livez HTTP/1.1\r\nHost: x\r\n%s\r\n" % KEY
        + b"GET /metrics HTTP/1.1\r\nHost: x\r\n%s\r\n" % KEY
        + b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n" % KEY
    )
    answers_to(port, requests)
    assert [int(piece[9:12]) for piece in written] == [100, 200, 405, 200, 404]
    assert b'"rewards"' in written[1]
    assert written[2].endswith(b"\r\n\r\n")
    for answer in (written[1], *written[3:]):
        head, _, content = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        assert length is not None
        assert int(length[1]) == len(content) > 0


def test_a_request_that_was_answered_before_its_body_has_no_second_answer(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request(b"Host: x", b"Connection: keep-alive", b"Transfer-Encoding: chunked"))
        first = b""
        while not first.endswith(b"}"):
            first += connection.recv(65536)
        assert first.startswith(b"HTTP/1.1 401")
        connection.sendall(b"no size\r\n" + INNER)
        assert rest_of(connection) == []


def test_whoever_sends_nothing_more_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 1.0)
    monkeypatch.setattr(connection_module, "REST_TIMEOUT_S", 1.5)
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 1.0)
    livez = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
    cut_off = [
        (b"", []),
        (b"\r\n", []),
        (b"GET /livez HTTP/1.1\r\nHo", [408]),
        (livez + b"\r\nG", [200, 408]),
        (livez + b"Content-Length: 10\r\n\r\n1", [200]),
        (request(b"Host: x", JSON, AUTH, LENGTH), [408]),
        (request(b"Host: x", JSON, AUTH, LENGTH, body=b"{"), [408]),
        (request(b"Host: x", JSON, AUTH, LENGTH, body=b"{").replace(b"/v1/rewards", b"/predict"), [408]),
    ]
    with serving(api_keys=["key"]) as port, ExitStack() as stack:
        silent = []
        for sent, expected in cut_off:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(sent)
            silent.append((connection, sent, expected))
        for connection, sent, expected in silent:
            assert [int(answer[:3]) for answer in rest_of(connection)] == expected, sent


def test_a_request_that_takes_long_is_not_cut_off_for_what_the_next_one_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "HEAD_TIMEOUT_S", 0.1)
    scorer = FakeScorer(held=True)
    with serving(scorer) as port, socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request(b"Host: x", b"Connection: keep-alive", JSON, LENGTH, body=BODY) + b"GET /li")
        assert scorer.entered.acquire(timeout=30)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        scorer.open()
        received = b""
        while b'"rewards":[5.0]' not in received:
            received += connection.recv(65536)


def test_beyond_the_bound_on_connections_health_answers_and_everything_else_is_told() -> None:
    with serving(max_connections=3) as port, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert statuses(port, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") == [200]
        [refused] = answers_to(port, request(b"Host: x", JSON, LENGTH, body=BODY))
        assert refused.startswith(b"503")
        assert b"connection: close" in refused
        assert b"3 connections are open, the most that the service takes" in refused


def test_the_bound_on_connections_leaves_files_for_other_uses() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert connections_allowed(10) == 10
    assert connections_allowed(10**9) == soft - OTHER_FILES


def test_parked_bodies_have_one_bound_together_and_small_requests_still_find_room() -> None:
    limits = ServiceLimits(max_body_bytes=1_000_000, max_held_bytes=4_000_000)
    head = request(b"Host: x", b"Connection: keep-alive", JSON, b"Content-Length: 1000000")
    with serving(limits=limits) as port, ExitStack() as stack:
        parked = []
        for _ in range(12):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(head + b"x" * 999_000)
            parked.append(connection)
        # Which of them find no room depends on whose bytes the service reads first.
        answered, _, _ = select.select(parked, [], [], 30)
        refused = b""
        while not refused.endswith(b"}"):
            refused += answered[0].recv(65536)
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"bytes of requests are held" in refused
        assert b"retry-after: 1" in refused
        assert statuses(port, request(b"Host: x", JSON, LENGTH, body=BODY)) == [200]


def test_what_waits_at_openrlhfs_door_is_bounded_and_whoever_leaves_gives_it_back(
    make_engine: Callable[..., Engine],
) -> None:
    limits = ServiceLimits(max_body_bytes=1_000_000, max_held_bytes=4_000_000)
    scorer = FakeScorer(held=True)
    app = create_app(make_engine(scorer), limits=limits, default_label="LENGTH")
    service = app.state.service
    # Of the queue's 100,000 tokens the first fills 76,800; each of the others is more than its share of the rest.
    first, other = (json.dumps({"query": ["a" * 2048] * count}).encode() for count in (150, 120))
    with listening(app) as port, ExitStack() as stack:

        def ask(body: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            head = b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            return connection

        def answered(connections: list[socket.socket]) -> list[socket.socket]:
            return select.select(connections, [], [], 0)[0]

        served = ask(first)
        assert scorer.entered.acquire(timeout=30)
        held_by_first = service.memory.bytes
        assert held_by_first == len(first)
        parked = [ask(other) for _ in range(60)]
        until(lambda: held_by_first + len(other) * (60 - len(answered(parked))) == service.memory.bytes, "60 requests")
        refused = answered(parked)
        assert 40 <= len(refused) < 60
        assert service.memory.bytes <= limits.max_held_bytes
        for connection in refused:
            assert connection.recv(65536).startswith(b"HTTP/1.1 503")
        for connection in parked:
            connection.close()
        until(lambda: service.memory.bytes == held_by_first, "what had been held")
        assert not service.unadmitted
        scorer.open()
        assert served.recv(65536).startswith(b"HTTP/1.1 200")
        assert ask(other).recv(65536).startswith(b"HTTP/1.1 200")
        until(lambda: service.memory.bytes == 0, "the rest")


def test_what_was_held_is_given_back(make_engine: Callable[..., Engine]) -> None:
    app = create_app(make_engine())
    sent: list[dict[str, object]] = []

    async def run(messages: list[dict[str, object]]) -> None:
        async def receive() -> dict[str, object]:
            return messages.pop(0)

        async def send(message: object) -> None:
            sent.append(message)  # type: ignore[arg-type]

        scope = {"type": "http", "method": "POST", "path": "/v1/rewards", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(run([{"type": "http.request", "body": BODY, "more_body": False}]))
    asyncio.run(run([{"type": "http.request", "body": b"{" * 100, "more_body": True}, {"type": "http.disconnect"}]))
    assert app.state.service.memory.bytes == 0
    assert json.loads(sent[1]["body"])["rewards"] == [5.0]  # type: ignore[arg-type]


def test_nonsense_does_not_fill_the_log() -> None:
    few = LogRateLimit()
    assert sum(few.filter(None) for _ in range(1000)) == 20  # type: ignore[arg-type]
