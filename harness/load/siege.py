"""Every attack at once against one reward service, beside clients that behave: are their rewards still right?

16 clients score known texts and compare every reward with the logit that the text has in an undisturbed service;
attackers send the requests of `ATTACKS` as fast as they are answered.
"""

import contextlib
import http.client
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from harness.reward_service import RewardService

CLIENTS = 16
TOLERANCE = 1e-5
WORDS = "the a movie film plot was is good bad great story not and but it this worst best acting of to in".split()  # noqa: SIM905
JSON = {"content-type": "application/json"}
PARK_S = 2.0
"""How long an attacker leaves half a request lying."""


@dataclass
class Outcome:
    """What the clients saw, and the service's memory in MB."""

    latencies: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    compared: int = 0
    wrong: int = 0
    attacks: Counter[str] = field(default_factory=Counter)
    start_mb: float = 0.0
    peak_mb: float = 0.0
    end_mb: float = 0.0
    health_s: float = 0.0
    """The longest that /livez took."""
    same_weights: bool | None = None

    def said(self) -> str:
        ranked = sorted(self.latencies) or [math.nan]
        p50, p99 = (ranked[int(share * (len(ranked) - 1))] * 1000 for share in (0.5, 0.99))
        lines = [
            f"{len(self.latencies)} requests of {CLIENTS} clients: p50 {p50:.0f} ms, p99 {p99:.0f} ms; "
            f"refused {dict(self.refused)}",
            f"{self.compared} rewards compared, {self.wrong} wrong",
            f"attacks {dict(self.attacks)}",
            f"/livez took {self.health_s * 1000:.0f} ms at most",
            f"memory {self.start_mb:.0f} MB at the start, {self.peak_mb:.0f} at most, {self.end_mb:.0f} at the end",
        ]
        if self.same_weights is not None:
            lines.append(f"the trained weights are {'the same' if self.same_weights else 'OTHERS'} to the bit")
        return "\n".join(lines)


def besieged_service(*flags: str) -> RewardService:
    """The reward service with the embedded model."""
    return RewardService("imdb-distilbert-mini", "--label", "POSITIVE", *flags)


def post(port: int, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", path, body, JSON)
        connection.getresponse().read()
    finally:
        connection.close()


def lying(port: int, sent: bytes, count: int, over: threading.Event) -> None:
    """Leave `count` connections with these bytes, and go after a while."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(sent)
        over.wait(PARK_S)


def head(path: str, length: int, *lines: str) -> bytes:
    fields = ["Host: x", "Content-Type: application/json", f"Content-Length: {length}", *lines]
    return f"POST {path} HTTP/1.1\r\n{chr(10).join(f'{field}{chr(13)}' for field in fields)}\n\r\n".encode()


BODIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "a shape of large integers": lambda: (
        "/v2/models/reward/infer",
        b'{"inputs":[{"name":"t","datatype":"BYTES","data":["a"],"shape":[%s]}]}' % b",".join([b"9" * 4000] * 1000),
    ),
    "a million unknown keys": lambda: (
        "/v1/rewards",
        b"{%s}" % b",".join(b'"k%d":1' % number for number in range(10**6)),
    ),
    "four million empty strings": lambda: ("/get_reward", b'{"query":[%s]}' % b",".join([b'""'] * 4 * 10**6)),
    "15 MB of combining marks": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": "", "response": "a" + "\u0301" * 2500}] * 1000}).encode(),
    ),
    "a greedy client": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": "this", "response": " good bad" * 40}] * 1024}).encode(),
    ),
}
"""Requests, each made once: making them is more work than refusing them."""

LYING: dict[str, tuple[bytes, int]] = {
    "silent connections": (b"", 100),
    "half a head": (b"GET /livez HTTP/1.1\r\nHo", 50),
    "parked bodies": (head("/v1/rewards", 4 * 10**6) + b"x" * 3 * 10**6, 20),
    "clients that leave OpenRLHF's door": (
        head("/get_reward", 903011) + json.dumps({"query": ["a" * 899] * 1000}).encode(),
        5,
    ),
    "a body that would be a second request": (
        head("/v1/rewards", 60, "Connection: Upgrade", "Upgrade: h2c") + b"GET /v1/model HTTP/1.1\r\n\r\n",
        5,
    ),
    "nonsense": (random.Random(0).randbytes(3000), 20),
}
"""Bytes that are sent and left lying, on so many connections."""
ATTACKS = [*BODIES, *LYING]


def expected_rewards(port: int, texts: list[str]) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with contextlib.closing(connection):
        return dict(zip(texts, _rewards(connection, texts)[1], strict=True))


def _rewards(connection: http.client.HTTPConnection, texts: list[str]) -> tuple[int, list[float]]:
    body = json.dumps({"items": [{"prompt": "", "response": text} for text in texts]})
    connection.request("POST", "/v1/rewards", body, JSON)
    answer = connection.getresponse()
    content = answer.read()
    return answer.status, json.loads(content)["rewards"] if answer.status == 200 else []


def besiege(service: RewardService, seconds: float, expected: dict[str, float]) -> Outcome:
    """Clients and attackers for so long."""
    port, process = service.port, psutil.Process(service.pid)
    outcome = Outcome(start_mb=process.memory_info().rss / 2**20)
    over, lock = threading.Event(), threading.Lock()
    texts = list(expected)

    def behave(seed: int) -> None:
        draw = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not over.is_set():
            wanted = draw.choices(texts, k=draw.randint(1, 8))
            began = time.monotonic()
            try:
                status, rewards = _rewards(connection, wanted)
            except (OSError, http.client.HTTPException):
                status, rewards = 0, []
                connection.close()
            with lock:
                if status != 200:
                    outcome.refused[status] += 1
                    continue
                outcome.latencies.append(time.monotonic() - began)
                outcome.compared += len(rewards)
                outcome.wrong += sum(
                    abs(expected[text] - reward) > TOLERANCE for text, reward in zip(wanted, rewards, strict=True)
                )
        connection.close()

    def attack(name: str) -> None:
        path, body = BODIES[name]() if name in BODIES else ("", b"")
        while not over.is_set() or not outcome.attacks[name]:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if body:
                    post(port, path, body)
                else:
                    lying(port, *LYING[name], over)
            outcome.attacks[name] += 1

    def look() -> None:
        while not over.wait(0.1):
            outcome.peak_mb = max(outcome.peak_mb, process.memory_info().rss / 2**20)
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/livez")
                assert connection.getresponse().status == 200
            outcome.health_s = max(outcome.health_s, time.monotonic() - began)

    threads = [threading.Thread(target=behave, args=(seed,)) for seed in range(CLIENTS)]
    threads += [threading.Thread(target=attack, args=(name,)) for name in ATTACKS]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    over.wait(seconds)
    over.set()
    for thread in threads:
        thread.join()
    # Idle again, and what was freed is given back.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        time.sleep(1)
        outcome.end_mb = process.memory_info().rss / 2**20
        if outcome.end_mb <= 1.1 * outcome.start_mb:
            break
    return outcome


def known_texts(port: int) -> dict[str, float]:
    """200 texts and the rewards that the service gives them before anything attacks it."""
    draw = random.Random(0)
    texts = sorted({" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(200)})
    return expected_rewards(port, texts)
