"""SIGTERM, with every kind of client that would keep the process alive, against the program in a process of its own."""

import errno
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.reward_service import RewardService
from plaudit.reward_service.http.server import _drop_new_connections

ENDLESS_RELOAD = """
import socket, threading
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.problems import ProblemError
from plaudit.reward_service.http.server import Hooks, Server
from harness.scorers import FakeScorer

def load():
    print("loading", flush=True)
    threading.Event().wait()

async def reload():
    try:
        await app.state.service.reload_model()
    except ProblemError as problem:
        print(problem.name, flush=True)

engine = Engine(FakeScorer(), batch_tokens=1, max_queue_tokens=1).start()
app = create_app(engine, reload=load)
listener = socket.create_server(("127.0.0.1", 0))
ready = lambda: print(listener.getsockname()[1], flush=True)
Server(app, 600.0, Hooks(ready, reload, lambda event, **details: print(event, flush=True))).run(sockets=[listener])
"""
"""The real server whose reload never ends."""
BODY = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


@pytest.fixture
def service(classifier_dir: Path) -> Iterator[RewardService]:
    # A batch for each text, so that an accepted request of many texts is still under way when the signal comes.
    flags = ("--label", "POSITIVE", "--batch-tokens", "1", "--max-queue-tokens", "1024", "--grace-s", "60")
    running = RewardService(classifier_dir, *flags)
    yield running
    running.kill()


@contextmanager
def sending(service: RewardService, data: bytes) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(data)
        yield connection


def until_metric(url: str, pattern: str) -> None:
    while not re.search(pattern, httpx.get(f"{url}/metrics").text):
        pass


def until_stuck(url: str) -> None:
    """Until nothing more is written to the client that never reads."""
    written = None
    while (now := re.findall(r'responses_total{route="/openapi.json".*', httpx.get(f"{url}/metrics").text)) != written:
        written = now


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    with connection.makefile("rb") as stream:
        head, _, body = stream.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_whatever_clients_do_the_accepted_are_answered_and_the_process_ends(service: RewardService) -> None:
    answers: list[httpx.Response] = []
    items = [{"prompt": "this movie", "response": " was great " * 9}] * 1024

    def ask() -> None:
        answers.append(httpx.post(f"{service.url}/v1/rewards", json={"items": items}, timeout=300))

    accepted = threading.Thread(target=ask)
    with ExitStack() as clients:
        accepted.start()
        until_metric(service.url, r"plaudit_reward_admitted_items_total 1024\.0")
        slow_body = clients.enter_context(sending(service, BODY % (b"/v1/rewards", 100, b"{")))
        slow_foreign_body = clients.enter_context(sending(service, BODY % (b"/predict", 100, b"{")))
        # More than this caller's share of a full queue.
        query = json.dumps({"query": ["waits for room"] * 1024}).encode()
        at_the_door = clients.enter_context(sending(service, BODY % (b"/get_reward", len(query), query)))
        clients.enter_context(sending(service, b""))
        clients.enter_context(sending(service, b"POST /v1/rewards HTTP/1.1\r\nHost:"))
        never_reads = clients.enter_context(sending(service, b""))
        never_reads.setblocking(False)
        kept = clients.enter_context(httpx.Client(base_url=service.url))
        assert kept.get("/readyz").status_code == 200
        with suppress(BlockingIOError):
            while True:
                never_reads.send(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        until_stuck(service.url)
        service.send_signal(signal.SIGTERM)
        while kept.get("/readyz").status_code == 200:
            pass
        refused = httpx.post(f"{service.url}/v1/rewards", json={"items": items[:1]})
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        accepted.join()
        assert [len(answer.json()["rewards"]) for answer in answers] == [1024]
        for connection in (slow_body, slow_foreign_body, at_the_door):
            status, problem = answer_of(connection)
            assert status == 503, problem
        # Only the client that never reads is left; it would hold the process for the rest of the grace time.
        service.send_signal(signal.SIGTERM)
        drained = service.next_event()
        assert service.wait() == 0
    assert (drained["event"], drained["accepted"], drained["answered"]) == ("drained", 1, 1)


@pytest.fixture
def endless_reload() -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-c", ENDLESS_RELOAD], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_reload_that_was_asked_for_does_not_hold_up_the_end(endless_reload: "subprocess.Popen[str]") -> None:
    assert endless_reload.stdout is not None
    port = int(endless_reload.stdout.readline())
    with socket.create_connection(("127.0.0.1", port)) as asks:
        asks.sendall(b"POST /v1/model:reload HTTP/1.1\r\nHost: x\r\n\r\n")
        assert endless_reload.stdout.readline() == "loading\n"
        endless_reload.send_signal(signal.SIGTERM)
        status, problem = answer_of(asks)
    assert (status, problem["type"]) == (503, "urn:plaudit:problem:draining")
    assert endless_reload.wait(60) == 0


def test_a_reload_by_signal_does_not_hold_up_the_end(endless_reload: "subprocess.Popen[str]") -> None:
    assert endless_reload.stdout is not None
    endless_reload.stdout.readline()
    endless_reload.send_signal(signal.SIGHUP)
    assert endless_reload.stdout.readline() == "loading\n"
    endless_reload.send_signal(signal.SIGTERM)
    assert endless_reload.wait(60) == 0
    assert endless_reload.stdout.read() == "draining\ndrained\n"


def test_a_log_that_nobody_reads_does_not_change_the_end(classifier_dir: Path) -> None:
    service = RewardService(classifier_dir, "--label", "POSITIVE")
    service.close_output()
    assert service.kill(signal.SIGTERM) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a filter of Linux")
def test_who_comes_as_the_port_closes_is_either_let_in_or_finds_it_closed() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as early, socket.socket() as late:
        _drop_new_connections(listener)
        late.setblocking(False)
        assert late.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        let_in, _ = listener.accept()
        listener.close()
        with let_in:
            early.sendall(b"a request")
            assert let_in.recv(100) == b"a request"
        select.select([], [late], [])
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
