"""Request lines and headers of any size, over a real socket."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from harness.reward_service import RewardService
from plaudit.serving.server import MAX_HEAD_BYTES

BODY = b'{"items": [{"prompt": "this movie", "response": " was great"}]}'


@pytest.fixture(scope="module")
def service(classifier_dir: Path) -> Iterator[RewardService]:
    running = RewardService(classifier_dir, "--label", "POSITIVE")
    yield running
    running.kill()


def head(size: int, *, path: str = "/v1/rewards", start: str = "X-Much: ") -> bytes:
    """The request line and headers of a request for rewards, filled up to `size` bytes."""
    line = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    line += f"Content-Length: {len(BODY)}\r\n{start}"
    return line.encode() + b"x" * (size - len(line) - 4) + b"\r\n\r\n"


def answer_to(service: RewardService, *pieces: bytes) -> tuple[int, dict[str, str], dict[str, object]]:
    """Status, headers and body of the answer, which must be the only one."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
        with connection.makefile("rb") as stream:
            status = int(stream.readline().split()[1])
            lines = (line.decode().strip().partition(": ") for line in iter(stream.readline, b"\r\n"))
            headers = {name: value for name, _, value in lines}
            return status, headers, json.loads(stream.read(int(headers["content-length"])))


def refusals(service: RewardService) -> float:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    name = 'plaudit_reward_refused_requests_total{reason="headers-too-large"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def assert_refused(answer: tuple[int, dict[str, str], dict[str, object]]) -> None:
    status, headers, problem = answer
    assert (status, headers["content-type"]) == (431, "application/problem+json")
    assert problem["type"] == "urn:plaudit:problem:headers-too-large"


def test_a_head_of_almost_the_bound_is_served(service: RewardService) -> None:
    status, _, answer = answer_to(service, head(MAX_HEAD_BYTES - 100) + BODY)
    assert status == 200
    assert len(answer["rewards"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/v1/rewards", "/predict", "/livez", "/nowhere"])
def test_a_head_over_the_bound_is_refused_on_every_route(service: RewardService, path: str) -> None:
    before = refusals(service)
    assert_refused(answer_to(service, head(MAX_HEAD_BYTES + 100, path=path) + BODY))
    assert_refused(answer_to(service, head(3 * MAX_HEAD_BYTES, path=path) + BODY))
    assert refusals(service) == before + 2


def test_many_small_headers_count_like_a_large_one(service: RewardService) -> None:
    lines = b"".join(b"x-%d: a\r\n" % number for number in range(MAX_HEAD_BYTES // 8))
    assert_refused(answer_to(service, head(300)[:-2] + lines + b"\r\n" + BODY))


@pytest.mark.parametrize("unfinished", ["X-Much: ", "X-Much"])
def test_a_head_without_an_end_is_refused_and_read_no_further(service: RewardService, unfinished: str) -> None:
    before = refusals(service)
    assert_refused(answer_to(service, head(MAX_HEAD_BYTES + 5, start=unfinished)[:-4]))
    assert_refused(answer_to(service, b"GET /" + b"x" * MAX_HEAD_BYTES))
    assert refusals(service) == before + 2


def test_heads_that_are_small_each_never_add_up(service: RewardService) -> None:
    with httpx.Client(base_url=service.url, headers={"x-much": "x" * (MAX_HEAD_BYTES // 2)}) as kept:
        assert [kept.get("/livez").status_code for _ in range(5)] == [200] * 5


def test_trailers_without_an_end_close_the_connection(service: RewardService) -> None:
    chunked = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[    \r\n0\r\nx-much: "

    def send(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"x" * MAX_HEAD_BYTES)

    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as connection:
        connection.sendall(chunked)
        with pytest.raises(ConnectionError):
            send(connection)
