"""HAProxy with the deployment's own file in front of services on this machine, and callers that never ask twice."""

import csv
import http.client
import json
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness.processes import free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "balancer" / "haproxy.cfg"
REPLICAS = "server-template replica 16 reward:8000 resolvers docker init-addr none"
STATISTICS = "/;csv"
ITEMS_OF_A_REQUEST = (1, 32)
"""Callers alternate between one text and as many as a chunk of the trainer's has."""


def balancer_file(
    directory: Path, port: int, operations: int, replicas: Sequence[int], *, config: Path = CONFIG
) -> Path:
    """haproxy.cfg with other ports, and replicas on ports of this machine instead of Docker's name server."""
    servers = "\n    ".join(f"server replica{i} 127.0.0.1:{replica}" for i, replica in enumerate(replicas))
    text = config.read_text()
    for old, new in {
        "bind :8000": f"bind 127.0.0.1:{port}",
        # One port for both: in the image the statistics have one that only the container itself reaches.
        "    http-request return status 404\n": "    stats enable\n    stats uri /\n",
        "bind 127.0.0.1:8405": f"bind 127.0.0.1:{free_port()}",
        "bind :8404": f"bind 127.0.0.1:{operations}",
        REPLICAS: servers,
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = directory / "haproxy.cfg"
    path.write_text(text)
    return path


def replicas_up(operations: int) -> int:
    """How many replicas the balancer with this operations port sends requests to; 0 while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{operations}{STATISTICS}", timeout=10) as answer:
            return replicas_up_in(answer.read().decode())
    except OSError:
        return 0


def replicas_up_in(statistics: str) -> int:
    """`replicas_up` in what the balancer's `STATISTICS` say."""
    rows = csv.DictReader(statistics.removeprefix("# ").splitlines())
    return sum(row["svname"].startswith("replica") and row["status"].startswith("UP") for row in rows)


@contextmanager
def asking_without_pause(port: int, callers: int = 4) -> Iterator[Counter[int]]:
    """Callers with a connection each that ask for rewards as long as the block lasts, and repeat nothing.

    Gives how often each status came; 0 where there was no whole answer.
    """
    statuses: Counter[int] = Counter()
    over = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while not over.is_set():
            for items in ITEMS_OF_A_REQUEST:
                statuses[_status(connection, items)] += 1
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _status(connection: http.client.HTTPConnection, items: int) -> int:
    text = {"prompt": "This movie", "response": " was wonderful, and so was the music. " * 12}
    body = json.dumps({"items": [text] * items, "label": "POSITIVE"})
    try:
        connection.request("POST", "/v1/rewards", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status == 200:
            assert len(json.loads(content)["rewards"]) == items
        return answer.status
    except (OSError, ValueError, http.client.HTTPException):
        connection.close()
        return 0
