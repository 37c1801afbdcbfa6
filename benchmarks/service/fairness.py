"""A small client beside a greedy one: how long it waits, whether it is refused, and what the greedy one loses.

    python -m benchmarks.service.fairness --model base
    python -m benchmarks.service.fairness --model imdb-distilbert-mini

The small client sends one text a request, the greedy one 1,024 texts; each sends its next request when it has its last
answer. Each is measured alone, then both together, in `--rounds` rounds, so that a busy machine disturbs all alike. The
small one must never be refused and have a p95 of at most its own alone plus two of the longest forward passes; the
greedy one must keep 90 % of its texts a second. How long a forward pass takes, the service says (Server-Timing) of a
request that fills one batch. `base` is a model of DistilBERT-base's size with random weights.
"""

import argparse
import http.client
import json
import math
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from harness.load.rewards import WORDS
from harness.reward_service import RewardService
from harness.tiny_judges import tiny_judge

BASE = {
    "dim": 768,
    "hidden_dim": 3072,
    "n_heads": 12,
    "n_layers": 6,
    "vocab_size": 30_522,
    "max_position_embeddings": 512,
}
GREEDY_ITEMS = 1024
SMALL_PAUSE_S = 0.02
BATCH_TOKENS = 1024
"""The service's own."""
KEEPS = 0.9
PASSES = 2


@dataclass
class Client:
    """What one client saw."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    elapsed: float = 0.0
    items: int = 0

    @property
    def items_per_s(self) -> float:
        return self.items / self.elapsed

    def percentile(self, percent: int) -> float:
        ranked = sorted(self.seconds)
        return ranked[math.ceil(len(ranked) * percent / 100) - 1]


@dataclass
class Measured:
    """Both clients, alone and together, in seconds."""

    small_alone: Client = field(default_factory=Client)
    small_beside: Client = field(default_factory=Client)
    greedy_alone: Client = field(default_factory=Client)
    greedy_beside: Client = field(default_factory=Client)
    kept: list[float] = field(default_factory=list)
    """In each round, the greedy client's texts a second beside the small one, as a share of those alone."""
    forward_s: float = 0.0
    """The longest forward pass."""

    @property
    def bound_s(self) -> float:
        return self.small_alone.percentile(95) + PASSES * self.forward_s

    @property
    def is_fair(self) -> bool:
        refused = any(set(client.statuses) != {200} for client in (self.small_alone, self.small_beside))
        return (
            not refused and self.small_beside.percentile(95) <= self.bound_s and statistics.median(self.kept) >= KEEPS
        )

    def __str__(self) -> str:
        rows = [
            f"{name}: {len(client.seconds)} requests, {dict(client.statuses)}, "
            f"p50 {client.percentile(50) * 1000:.0f} ms, p95 {client.percentile(95) * 1000:.0f} ms, "
            f"{client.items_per_s:.1f} texts/s"
            for name, client in (
                ("small, alone", self.small_alone),
                ("small, beside greedy", self.small_beside),
                ("greedy, alone", self.greedy_alone),
                ("greedy, beside small", self.greedy_beside),
            )
        ]
        p95 = self.small_beside.percentile(95)
        more = (p95 - self.small_alone.percentile(95)) / self.forward_s
        rows += [
            f"longest forward pass {self.forward_s * 1000:.0f} ms; the small client's p95 beside the greedy one may be "
            f"{self.bound_s * 1000:.0f} ms and is {p95 * 1000:.0f}: {more:.2f} passes more than alone",
            f"the greedy client keeps {statistics.median(self.kept):.3f} of its texts a second (median of "
            f"{', '.join(f'{share:.3f}' for share in self.kept)})",
            "fair" if self.is_fair else "NOT FAIR",
        ]
        return "\n".join(rows)


class Caller:
    """A client with a connection of its own, which is what the service shares by."""

    def __init__(self, url: str, items: int, words: int, seed: int) -> None:
        self._http = http.client.HTTPConnection(url.removeprefix("http://"), timeout=600)
        self._draw = random.Random(seed)
        self._items, self._words = items, words

    def ask(self, client: Client) -> float:
        """One request; gives the seconds that its forward passes took, by the service's word."""
        texts = [" ".join(self._draw.choices(WORDS, k=self._words)) for _ in range(self._items)]
        body = json.dumps({"items": [{"prompt": text, "response": ""} for text in texts], "label": "POSITIVE"})
        began = time.perf_counter()
        self._http.request("POST", "/v1/rewards", body, {"content-type": "application/json"})
        answer = self._http.getresponse()
        content = answer.read()
        seconds = time.perf_counter() - began
        client.statuses[answer.status] += 1
        client.elapsed += seconds
        if answer.status != 200:
            return 0.0
        assert len(json.loads(content)["rewards"]) == self._items
        client.seconds.append(seconds)
        client.items += self._items
        inference = re.search(r"inference;dur=([\d.]+)", answer.headers["server-timing"])
        assert inference is not None
        return float(inference[1]) / 1000

    def close(self) -> None:
        """End the connection; the next request has a new one."""
        self._http.close()


def measure(model: Path, *, rounds: int, small_requests: int, greedy_requests: int, words: int) -> Measured:
    """`rounds` times: `small_requests` alone, `greedy_requests` alone, and as many beside the small client."""
    measured = Measured()
    with RewardService(model) as service:
        small, greedy = Caller(service.url, 1, words, 0), Caller(service.url, GREEDY_ITEMS, words, 1)
        # Words and the two tokens around them; filled, but not over.
        full = Caller(service.url, BATCH_TOKENS // (words + 2), words, 2)
        passes = [full.ask(Client()) for _ in range(8)]
        for _ in range(rounds):
            for caller in (small, greedy, full):
                caller.close()  # the service closes what is idle for long
            for _ in range(small_requests):
                small.ask(measured.small_alone)
                time.sleep(SMALL_PAUSE_S)
            alone, beside = Client(), Client()
            for _ in range(greedy_requests):
                greedy.ask(alone)
            over = threading.Event()

            def behave(over: threading.Event = over) -> None:
                while not over.is_set():
                    small.ask(measured.small_beside)
                    time.sleep(SMALL_PAUSE_S)

            small.close()
            thread = threading.Thread(target=behave)
            thread.start()
            for _ in range(greedy_requests):
                greedy.ask(beside)
            over.set()
            thread.join()
            measured.kept.append(beside.items_per_s / alone.items_per_s)
            for total, one in ((measured.greedy_alone, alone), (measured.greedy_beside, beside)):
                total.seconds += one.seconds
                total.statuses += one.statuses
                total.elapsed += one.elapsed
                total.items += one.items
            full.close()
            passes += [full.ask(Client()) for _ in range(4)]
        measured.forward_s = max(passes[1:])
        for caller in (small, greedy, full):
            caller.close()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="base, an embedded model or a directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small-requests", type=int, default=50, help="of the small client alone, in a round")
    parser.add_argument(
        "--greedy-requests", type=int, default=2, help="of the greedy client, alone and beside, in a round"
    )
    parser.add_argument("--words", type=int, default=14, help="of each text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = tiny_judge(Path(name), "distilbert", **BASE) if arguments.model == "base" else Path(arguments.model)
        measured = measure(
            model,
            rounds=arguments.rounds,
            small_requests=arguments.small_requests,
            greedy_requests=arguments.greedy_requests,
            words=arguments.words,
        )
    print(measured)
    sys.exit(not measured.is_fair)


if __name__ == "__main__":
    main()
