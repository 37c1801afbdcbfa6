"""The ranking service for tests: rows to rank, people who rank them, and the real program in a process of its own."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from harness.processes import Program
from plaudit.wire import rankings as wire

KEY = "the-administrations-key"
ADMIN = {"authorization": f"Bearer {KEY}"}
Fill = Callable[..., wire.BatchUploaded]
"""Uploads so many tasks to a database, with a batch's settings by name."""
Invite = Callable[..., int]
"""Invites a person of a role; their number."""
ClientOf = Callable[..., httpx.AsyncClient]
"""A client of the application over a database, with the application's options by name."""


def rows(n: int, *, batch: str = "b1", k: int = 4, group: str | None = None) -> list[wire.AnswersRow]:
    """`n` prompts with `k` answers each, by policies p0, p1, ..."""
    return [
        wire.new_answers_row(
            batch,
            f"Prompt {i}",
            [wire.new_answer(f"Answer {j} to prompt {i}.", policy=f"p{j}", revision="r", seed=j) for j in range(k)],
            group=group,
        )
        for i in range(n)
    ]


def upload(listed: Sequence[wire.AnswersRow], **settings: Any) -> wire.BatchUpload:
    """An upload of these rows to the batch that they name."""
    return wire.BatchUpload(id=settings.pop("id", listed[0].batch if listed else "b1"), rows=list(listed), **settings)


def in_shown_order(task: Mapping[str, Any]) -> dict[str, int]:
    """A ranking: the first shown is best, and so on."""
    return {answer["id"]: place for place, answer in enumerate(task["answers"], start=1)}


class RankingService(Program):
    """`python -m plaudit.ranking_service serve` on a port that stays the same; it answers when it is made."""

    def __init__(self, database: str, *flags: str) -> None:
        super().__init__(environment=os.environ | {"RANK_API_KEY": KEY, "RANK_DATABASE": database})
        self.database = database
        self._flags = ("--requests-per-minute", "0", "--requests-per-minute-address", "0", *flags)
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Start the program and wait until it answers."""
        self.command = [
            sys.executable,
            "-m",
            "plaudit.ranking_service",
            "serve",
            "--port",
            str(self.port),
            *self._flags,
        ]
        self.begin()
        self.port = int(self.wait_for_event("ready")["url"].rpartition(":")[2])

    def admin(self) -> httpx.Client:
        """A client with the administration's key."""
        return httpx.Client(base_url=self.url, headers=ADMIN, timeout=30)

    def upload(self, listed: Sequence[wire.AnswersRow], **settings: Any) -> None:
        """Send rows, which must be accepted."""
        with self.admin() as http:
            answer = http.post("/v1/batches", content=upload(listed, **settings).model_dump_json())
        assert answer.is_success, answer.text

    def invite(self, **settings: Any) -> wire.Invited:
        """One more person."""
        with self.admin() as http:
            answer = http.post("/v1/annotators", json=settings)
        assert answer.status_code == 201, answer.text
        return wire.Invited.model_validate_json(answer.content)

    def annotator(self, **settings: Any) -> httpx.Client:
        """A program that ranks as a new person."""
        token = self.invite(**settings).token
        headers = {"authorization": f"Bearer {token}", "accept": "application/json"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def rankings(self, batch: str = "b1", **query: Any) -> list[dict[str, Any]]:
        """All rankings of a batch, page by page."""
        found: list[dict[str, Any]] = []
        after, more = 0, True
        with self.admin() as http:
            while more:
                page = http.get(f"/v1/batches/{batch}/rankings", params={"after": after, **query}).json()
                found += page["rows"]
                after, more = page["after"], page["more"]
        return found

    def progress(self, batch: str = "b1") -> dict[str, Any]:
        """How far a batch is."""
        with self.admin() as http:
            found: dict[str, Any] = http.get(f"/v1/batches/{batch}").json()
        return found
