"""Many people who rank at once while the service is killed, and an account of what became of their rankings."""

import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.ranking_service import RankingService, in_shown_order, rows
from plaudit.ranking_service.store.batches import overlaps

GIVE_UP_S = 300.0
"""How long one person goes on asking a service that does not answer."""


@dataclass
class Account:
    """What was sent, and what the service says it has."""

    people: int
    rankings: int
    doubled: int = 0
    kills: int = 0
    interrupted: int = 0
    """Requests that got no answer, and were sent again."""
    lost: int = 0
    """Rankings that were acknowledged and are not there."""
    duplicated: int = 0
    """Rankings that are there twice, or as two versions of one."""
    over: int = 0
    """Rankings that count beyond what their task wants."""
    twice: int = 0
    """Times that somebody was given a task again."""
    wrong: int = 0
    """Rankings that are there and are not what was sent."""
    seconds: float = 0.0
    submits_s: list[float] = field(default_factory=list)
    """Time of each submit that was answered at the first try."""

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.submits_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def faults(self) -> tuple[int, int, int, int, int]:
        return self.lost, self.duplicated, self.over, self.twice, self.wrong


class Person:
    """One person: a connection, an invitation, and what they were given and have had acknowledged."""

    def __init__(self, service: RankingService, token: str, account: Account, lock: threading.Lock) -> None:
        self._port = service.port
        self._headers = {
            "authorization": f"Bearer {token}",
            "accept": "application/json",
            "content-type": "application/json",
        }
        self._connection: http.client.HTTPConnection | None = None
        self._account = account
        self._lock = lock
        self.sent: dict[str, dict[str, int]] = {}
        """Ranks by task, as they were acknowledged."""
        self.given: dict[str, str] = {}
        """Assignment by task."""

    def ask(self, method: str, path: str, body: Any = None) -> tuple[Any, bool]:
        """The answer, and whether it came at the first try. Asks again, the same thing, until there is one."""
        first = True
        deadline = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline:
            try:
                if self._connection is None:
                    self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
                self._connection.request(method, path, None if body is None else json.dumps(body), self._headers)
                answer = self._connection.getresponse()
                content = answer.read()
                if answer.status == 200:
                    return json.loads(content), first
                assert answer.status == 503, content
            except (OSError, http.client.HTTPException):
                self.close()
            with self._lock:
                self._account.interrupted += 1
            first = False
            time.sleep(0.02)  # between two tries, as any client waits
        raise AssertionError(f"no answer to {method} {path} within {GIVE_UP_S:g} s")

    def work(self, draw: random.Random, twin: "Person", doubled: float) -> None:
        """Rank until there is nothing left. `twin` is the second click: another connection of the same person."""
        while True:
            task, _ = self.ask("GET", "/")
            if task["assignment"] is None:
                if not task["waiting"]:
                    break
                continue
            if (
                task["task"] in self.sent
                or self.given.setdefault(task["task"], task["assignment"]) != task["assignment"]
            ):
                with self._lock:
                    self._account.twice += 1
            order = in_shown_order(task)
            ranks = dict(zip(order, draw.sample([1, 2, 3, 4], 4) if draw.random() < 0.7 else [1, 2, 2, 3], strict=True))
            body = {"key": task["key"], "version": task["version"], "ranks": ranks}
            path = f"/a/{task['assignment']}/ranking"
            second = None
            if draw.random() < doubled:
                second = threading.Thread(target=twin.ask, args=("POST", path, body))
                second.start()
            began = time.monotonic()
            answer, at_once = self.ask("POST", path, body)
            took = time.monotonic() - began
            self.sent[task["task"]] = ranks
            with self._lock:
                self._account.doubled += second is not None
                if at_once:
                    self._account.submits_s.append(took)
            assert answer["status"] in ("counted", "surplus"), answer
            if second is not None:
                second.join()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def storm(
    service: RankingService,
    *,
    people: int,
    tasks: int,
    share: float = 0.25,
    overlap: int = 3,
    kills: int = 3,
    seed: int = 0,
) -> Account:
    """Have `people` rank `tasks` as fast as they can, double a fifth of the submits, and kill the service meanwhile."""
    service.upload(rows(tasks), overlap=overlap, overlap_share=share)
    wanted = service.progress()["wanted"]
    account = Account(people, wanted)
    lock = threading.Lock()
    crowd = []
    names = []
    for _ in range(people):
        invited = service.invite()
        names.append(invited.annotator)
        crowd.append((Person(service, invited.token, account, lock), Person(service, invited.token, account, lock)))
    began = time.monotonic()
    with ThreadPoolExecutor(people) as pool:
        working = [
            pool.submit(one.work, random.Random(seed * 1000 + i), twin, 0.2) for i, (one, twin) in enumerate(crowd)
        ]
        for kill in range(1, kills + 1):
            while len(account.submits_s) < wanted * kill / (kills + 1) and not all(w.done() for w in working):
                time.sleep(0.01)
            service.kill()
            account.kills += 1
            service.start()
        for work in working:
            work.result()
    account.seconds = time.monotonic() - began
    for one, twin in crowd:
        one.close()
        twin.close()
    sent = {name: one.sent for name, (one, _) in zip(names, crowd, strict=True)}
    _check(service, account, sent, tasks, share, overlap)
    return account


def _check(
    service: RankingService,
    account: Account,
    sent: dict[str, dict[str, dict[str, int]]],
    tasks: int,
    share: float,
    overlap: int,
) -> None:
    found = service.rankings(late="true", limit=5000)
    there = {(row["annotator"], row["task"]): row for row in found}
    account.duplicated = len(found) - len(there) + sum(row["version"] > 1 for row in found)
    for annotator, theirs in sent.items():
        for task, ranks in theirs.items():
            row = there.pop((annotator, task), None)
            if row is None:
                account.lost += 1
                continue
            recorded = {answer["id"]: rank for answer, rank in zip(row["answers"], row["ranks"], strict=True)}
            account.wrong += recorded != ranks
    # What is there and was never acknowledged: nobody works on once all is answered, so there is none.
    account.wrong += len(there)
    counted = Counter(row["task"] for row in found if row["status"] == "counted")
    wants = {row.id: overlap if overlaps(i, share) else 1 for i, row in enumerate(rows(tasks))}
    account.over = sum(max(0, n - wants[task]) for task, n in counted.items())
    account.rankings = sum(counted.values())


def fsync_rate(directory: Path, *, seconds: float = 1.0) -> float:
    """How many times in a second 4 KiB reach the disk of this directory."""
    path = directory / "fsync-probe"
    count = 0
    with path.open("wb", buffering=0) as file:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            file.write(os.urandom(4096))
            os.fsync(file.fileno())
            count += 1
        took = time.monotonic() - began
    path.unlink()
    return count / took
