"""Servers that answer what nobody asked, or with more than they should, over real sockets."""

import contextlib
import gzip
import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from plaudit.rewards import RewardClient, RewardRejected, client, source
from plaudit.rewards.settings import EndpointKind, RewardComponent, RewardSettings
from plaudit.wire import REQUEST_ID_HEADER

KEY = "a-key-of-ours"
INFO = {
    "id": "m",
    "revision": "sha256:x",
    "labels": ["POSITIVE"],
    "limits": {"max_items": 64, "max_text_chars": 1000, "max_body_bytes": 1 << 20, "max_tokens": 256},
}
Headers = dict[str, str]
Answer = Callable[[str, Headers, bytes], bytes]


def packet(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = {"content-type": "application/json", "content-length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def rewards(body: bytes, value: float | None = None, **more: Any) -> bytes:
    """An honest answer's reward is the length of its prompt."""
    values = [float(len(item["prompt"])) if value is None else value for item in json.loads(body)["items"]]
    answer = {"rewards": values, "model": "m", "revision": "sha256:x", "label": "POSITIVE", "truncated": [], **more}
    return packet(json.dumps(answer).encode())


@contextmanager
def server(
    answer: Answer, info: Callable[[Headers], dict[str, Any]] = lambda headers: INFO
) -> Iterator[tuple[str, Any]]:
    """`answer` gives the bytes for a scoring request, `info` the description. Gives the URL and what was received."""
    received: list[tuple[str, Headers]] = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                headers: Headers = {}
                while field := stream.readline().strip():
                    name, _, value = field.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = stream.read(int(headers.get("content-length", "0")))
                path = line.split()[1].decode()
                received.append((path, headers))
                if body:
                    connection.sendall(answer(path, headers, body))
                else:
                    connection.sendall(packet(json.dumps(info(headers) if path == "/v1/model" else {}).encode()))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", received
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "WAIT_INITIAL_S", 0.01)
    monkeypatch.setattr(source, "WAIT_MAX_S", 0.02)
    monkeypatch.setattr(source, "WAIT_JITTER_S", 0.01)


def settings(url: str, *, kind: EndpointKind = "plaudit", **changes: Any) -> RewardSettings:
    shared = {"patience_s": 20.0, "check_order": False, "max_in_flight": 1}
    return RewardSettings.of(url=(url,), kind=kind, **shared | changes)


def scores_of(url: str, **changes: Any) -> list[float]:
    """What three texts get, one after the other: their lengths, from an honest server."""
    with RewardClient(settings(url, **changes)) as open_client:
        open_client.connect()
        return [open_client.score([prompt], ["x"])[0] for prompt in ("a", "bbbbbbb", "cc")]


def knows_ids(headers: Headers) -> dict[str, Any]:
    return INFO | {"request_id": headers[REQUEST_ID_HEADER]}


def test_an_answer_that_nobody_asked_for_is_never_a_reward() -> None:
    asked = 0

    def answer(path: str, headers: Headers, body: bytes) -> bytes:
        nonlocal asked
        asked += 1
        return rewards(body) + (rewards(body, 666.0) if asked == 1 else b"")

    with server(answer) as (url, _):
        assert scores_of(url) == [1.0, 7.0, 2.0]


def test_neither_is_it_in_a_foreign_protocol() -> None:
    asked = 0

    def answer(path: str, headers: Headers, body: bytes) -> bytes:
        nonlocal asked
        asked += 1
        values = [float(len(query)) for query in json.loads(body)["query"]]
        stale = packet(json.dumps({"rewards": [666.0] * len(values)}).encode()) if asked == 1 else b""
        return packet(json.dumps({"rewards": values}).encode()) + stale

    with server(answer) as (url, _):
        assert scores_of(url, kind="openrlhf") == [2.0, 8.0, 3.0]


def test_an_answer_to_another_request_is_asked_for_again() -> None:
    ids: list[str] = []

    def answer(path: str, headers: Headers, body: bytes) -> bytes:
        ids.append(headers[REQUEST_ID_HEADER])
        if len(ids) == 2:
            return rewards(body, 666.0, request_id=ids[0])
        if len(ids) == 3:
            return rewards(body, 666.0)
        return rewards(body, request_id=ids[-1])

    with server(answer, knows_ids) as (url, _):
        assert scores_of(url) == [1.0, 7.0, 2.0]
    assert len(set(ids)) == len(ids) == 5


def test_an_older_service_works_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with server(lambda path, headers, body: rewards(body)) as (url, _):
        assert scores_of(url) == [1.0, 7.0, 2.0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "from before request ids" in caplog.text


@pytest.mark.parametrize("layers", [1, 2])
def test_a_packed_answer_is_not_unpacked_beyond_the_bound(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"[" * (100 * 2**20)
    for _ in range(layers):
        body = gzip.compress(body, 9)
    packed = packet(body, content_encoding=", ".join(["gzip"] * layers))
    with server(lambda *_: packed) as (url, _), pytest.raises(RewardRejected) as caught:
        scores_of(url)
    said = str(caught.value)
    assert ("more than 16777216 bytes" if layers == 1 else "the answer is packed (gzip, gzip)") in said
    exchange = caught.value.exchange
    assert exchange is not None
    assert exchange.answer is not None
    assert len(exchange.answer) <= 16 * 2**20


def test_what_a_server_says_is_safe_to_print_and_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(client.API_KEY_VARIABLE, KEY)

    def answer(path: str, headers: Headers, body: bytes) -> bytes:
        said = f"\x1b]0;PWNED\x07\x9b2J\x1b]52;c;ZXZpbA==\x07 you sent {headers['authorization']} " + "A" * 300_000
        problem = {"type": "x", "title": "t", "status": 422, "detail": said}
        return packet(json.dumps(problem).encode(), "422 No", set_cookie="session=SECRET")

    with server(answer) as (url, _), pytest.raises(RewardRejected) as caught:
        scores_of(url)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000
    assert KEY not in str(caught.value)
    victim = tmp_path / "precious"
    victim.write_text("precious")
    directory = tmp_path / "run"
    directory.mkdir()

    (directory / f"rejected-reward.{os.getpid()}.tmp").symlink_to(victim)
    written = caught.value.save(directory)
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    text = written.read_text()
    assert KEY not in text
    assert "SECRET" not in text
    assert all(char.isprintable() or char == "\n" for char in text)
    assert json.loads(text)["exchange"]["headers"]["content-type"] == "application/json"


def test_a_model_with_a_name_that_moves_the_cursor_is_refused() -> None:
    with (
        server(lambda *_: b"", lambda headers: INFO | {"id": "m\x1b[31m"}) as (url, _),
        pytest.raises(RewardRejected, match="a name that can't be shown") as caught,
    ):
        scores_of(url)
    assert str(caught.value).isprintable()


def test_the_key_of_the_environment_goes_to_the_first_reward_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(client.API_KEY_VARIABLE, f"{KEY}\n")
    theirs = tmp_path / "theirs"
    theirs.write_text("their-key\n")

    def honest(path: str, headers: Headers, body: bytes) -> bytes:
        return rewards(body)

    with server(honest) as (ours, first), server(honest) as (third, second), server(honest) as (fourth, keyed):
        components = (
            RewardComponent(url=(ours,)),
            RewardComponent(name="third", url=(third,)),
            RewardComponent(name="fourth", url=(fourth,), api_key_file=theirs),
        )
        with RewardClient(RewardSettings(components, patience_s=5.0)) as open_client:
            open_client.connect()
            open_client.score(["a"], ["b"])
    assert {headers.get("authorization") for _, headers in first} == {f"Bearer {KEY}"}
    assert {headers.get("authorization") for _, headers in second} == {None}
    assert {headers.get("authorization") for _, headers in keyed} == {"Bearer their-key"}
