"""Clients of the ranking service: for administrators (batches, invitations, rankings) and for annotators.

Failure modes: a ranking that is sent twice counts twice; a ranking is lost during a short outage. Every retry carries
the same idempotency key, or is harmless when repeated.
"""

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from plaudit.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, ConfigError, PlauditError
from plaudit.rewards.proxies import proxy_for
from plaudit.rewards.settings import without_credentials
from plaudit.wire import Problem
from plaudit.wire import rankings as wire

API_KEY_VARIABLE = "RANK_API_KEY"
REQUEST_TIMEOUT_S = 60.0
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that are retried."""
PAGE = 1000
QUOTED_CHARS = 300
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Hosts to which browsers send Secure cookies over plain http."""

M = TypeVar("M", bound=BaseModel)
_BATCHES = TypeAdapter(list[wire.BatchProgress])


class RankingsUnavailable(PlauditError):
    """The ranking service did not answer in time, or people have not finished. Continue later (exit 75)."""

    exit_code = EXIT_UNAVAILABLE
    can_be_resumed = True


class RankingsRejected(PlauditError):
    """The ranking service refused a request, or its answer can't be used: waiting won't help (exit 65)."""

    exit_code = EXIT_REJECTED

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Service:
    """Requests to one ranking service, retried until they are answered or `patience_s` is over."""

    def __init__(
        self,
        url: str,
        *,
        patience_s: float,
        on_wait: Callable[[str], None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = without_credentials(url).rstrip("/")
        """Without credentials, for messages."""
        self._patience_s = patience_s
        self._on_wait = on_wait
        proxy = proxy_for(url, os.environ)
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            timeout=REQUEST_TIMEOUT_S,
            transport=transport,
            proxy=proxy.url if proxy else None,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def _ask(
        self, method: str, path: str, *, body: str | None = None, headers: dict[str, str] | None = None, **query: Any
    ) -> httpx.Response:
        """Send an idempotent request with retries. Raises `RankingsUnavailable` or `RankingsRejected`."""
        headers = {"accept": "application/json"} | (headers or {})
        if body is not None:
            headers["content-type"] = "application/json"
        deadline, wait_s = time.monotonic() + self._patience_s, FIRST_WAIT_S
        while True:
            retry_after_s = 0.0
            try:
                answer = self._http.request(method, path, content=body, headers=headers, params=query)
            except httpx.TransportError as error:
                trouble = f"{self.url}: {str(error) or type(error).__name__}"
            else:
                if answer.is_success or answer.is_redirect:
                    return answer
                if answer.status_code not in PASSING:
                    raise RankingsRejected(
                        f"{method} {self.url}{path} is refused ({answer.status_code}): {_detail(answer)}",
                        answer.status_code,
                    )
                trouble = f"{self.url}: {answer.status_code}: {_detail(answer)}"
                retry_after_s = _retry_after_s(answer)
            pause_s = max(wait_s, retry_after_s)
            if time.monotonic() + pause_s > deadline:
                raise RankingsUnavailable(
                    f"the ranking service gave no answer for {self._patience_s:g} s ({trouble}); start it, then go on"
                )
            if self._on_wait is not None:
                self._on_wait(f"waiting for the ranking service: {trouble}")
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _parsed(self, kind: type[M], answer: httpx.Response) -> M:
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RankingsRejected(
                f"{answer.request.method} {self.url}{answer.request.url.path} answered something that is no "
                f"{kind.__name__} ({where}: {first['msg']}): is that address a ranking service of this version?"
            ) from error


class RankingAdmin(_Service):
    """The administrator's client, with a key. Use it as a context manager.

    Raises `ConfigError` for a URL or a key file that can't be used.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_file: Path | None = None,
        patience_s: float,
        on_wait: Callable[[str], None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, patience_s=patience_s, on_wait=on_wait, transport=transport)
        self._http.headers["authorization"] = f"Bearer {read_key(api_key_file)}"

    def upload(self, upload: wire.BatchUpload) -> wire.BatchUploaded:
        """Create the batch, or add rows to it. Existing rows are left unchanged."""
        return self._parsed(wire.BatchUploaded, self._ask("POST", wire.BATCHES_PATH, body=upload.model_dump_json()))

    def progress(self, batch: str) -> wire.BatchProgress:
        """The progress of a batch."""
        return self._parsed(wire.BatchProgress, self._ask("GET", f"{wire.BATCHES_PATH}/{batch}"))

    def batches(self) -> list[wire.BatchProgress]:
        """The progress of all batches."""
        answer = self._ask("GET", wire.BATCHES_PATH)
        try:
            return _BATCHES.validate_json(answer.content)
        except ValidationError as error:
            raise RankingsRejected(
                f"{self.url}{wire.BATCHES_PATH} answered no list of batches: is that a ranking service of this version?"
            ) from error

    def agreement(self, batch: str) -> wire.AgreementReport:
        """The agreement statistics of a batch."""
        return self._parsed(wire.AgreementReport, self._ask("GET", f"{wire.BATCHES_PATH}/{batch}/agreement"))

    def rankings(self, batch: str) -> list[wire.RankingRow]:
        """The newest version of each annotator's ranking of each task in a batch, in a fixed order."""
        newest: dict[tuple[str, str], wire.RankingRow] = {}
        after, more = 0, True
        while more:
            path = f"{wire.BATCHES_PATH}/{batch}/rankings"
            page = self._parsed(wire.RankingsPage, self._ask("GET", path, after=after, limit=PAGE))
            for row in page.rows:
                known = newest.get((row.task, row.annotator))
                if known is None or known.version < row.version:
                    newest[row.task, row.annotator] = row
            after, more = page.after, page.more
        return [newest[key] for key in sorted(newest)]

    def invitation(self, name: str) -> str:
        """A new invitation link for the annotator of this name, who is created if unknown."""
        for info in json.loads(self._ask("GET", wire.ANNOTATORS_PATH).content):
            if info["name"] == name and not info["disabled"]:
                return str(
                    json.loads(self._ask("POST", f"{wire.ANNOTATORS_PATH}/{info['annotator']}/link").content)["link"]
                )
        invite = wire.Invite(name=name)
        return self._parsed(wire.Invited, self._ask("POST", wire.ANNOTATORS_PATH, body=invite.model_dump_json())).link


class RankingPerson(_Service):
    """An annotator's client, which uses the browser's routes: invitation link, session cookie, CSRF token.

    Only the last part of the invitation `link` is used, so the service may be reached by another address than the one
    in the link. Use it as a context manager.
    """

    def __init__(self, url: str, link: str, *, patience_s: float, transport: httpx.BaseTransport | None = None) -> None:
        super().__init__(url, patience_s=patience_s, transport=transport)
        self._invitation = f"{wire.INVITATION_PATH}/{quote(link.rstrip('/').rpartition('/')[2])}"
        parts = urlsplit(url)
        self._origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._secure = parts.scheme == "https" or parts.hostname in LOCAL_HOSTS
        self._headers: dict[str, str] = {}
        """Cookie and CSRF token of the session."""

    def next_task(self) -> wire.TaskView | wire.NoTask:
        """The next task. It stays assigned to this annotator until it is ranked or skipped."""
        answer = self._signed_in("GET", "/")
        if json.loads(answer.content).get("assignment") is None:
            return self._parsed(wire.NoTask, answer)
        return self._parsed(wire.TaskView, answer)

    def rank(self, task: wire.TaskView, ranks: dict[str, int]) -> wire.Accepted:
        """Submit a rank for each answer. Retries carry the same idempotency key."""
        message = wire.RankingSubmit(key=task.key, version=task.version, ranks=ranks)
        return self._submit(task, "ranking", message)

    def skip(self, task: wire.TaskView) -> wire.Accepted:
        """Skip the task, so that another annotator gets it."""
        return self._submit(task, "skip", wire.SkipSubmit(key=task.key, version=task.version))

    def _submit(self, task: wire.TaskView, action: Literal["ranking", "skip"], message: BaseModel) -> wire.Accepted:
        path = f"{wire.ASSIGNMENT_PATH}/{task.assignment}/{action}"
        return self._parsed(wire.Accepted, self._signed_in("POST", path, message.model_dump_json()))

    def _signed_in(self, method: str, path: str, body: str | None = None) -> httpx.Response:
        """Send a request as this annotator. If the session has expired, sign in again once."""
        if not self._headers:
            self._sign_in()
        try:
            return self._ask(method, path, body=body, headers=self._headers)
        except RankingsRejected as error:
            if error.status != 401:
                raise
        self._sign_in()
        return self._ask(method, path, body=body, headers=self._headers)

    def _sign_in(self) -> None:
        answer = self._ask("POST", self._invitation, headers={"origin": self._origin})
        cookie, *attributes = answer.headers.get("set-cookie", "").split(";")
        if not cookie:
            raise RankingsRejected(f"{self.url}{wire.INVITATION_PATH}/… gave no session: is that a ranking service?")
        if not self._secure and any(attribute.strip().lower() == "secure" for attribute in attributes):
            raise RankingsRejected(
                f"{self.url}: its sessions travel over https alone; use https, or start it with --no-secure-cookies"
            )
        # Set by hand, because Python's cookie jar, unlike browsers, sends no Secure cookie to http://localhost.
        self._http.cookies.clear()
        headers = {"cookie": cookie.strip(), "origin": self._origin, "sec-fetch-site": "same-origin"}
        page = self._ask("GET", "/mine", headers=headers | {"accept": "text/html"})
        token = re.search(r'name="csrf" value="([^"]+)"', page.text)
        if token is None:
            raise RankingsRejected(f"{self.url}/mine holds no CSRF token: is that a ranking service of this version?")
        self._headers = headers | {"x-csrf-token": token[1]}


def read_key(file: Path | None) -> str:
    """The administrator's key: the first line of the file, or the environment variable RANK_API_KEY."""
    if file is None:
        key = os.environ.get(API_KEY_VARIABLE, "")
    else:
        try:
            lines = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file={file} can't be read: {error}") from error
        key = lines[0] if lines else ""
    if not (key and key.isascii() and key.isprintable()):
        what = f"api_key_file={file} holds" if file else f"there is no api_key_file, and {API_KEY_VARIABLE} holds"
        raise ConfigError(f"{what} no key in plain ASCII: the ranking service's RANK_API_KEY is needed")
    return key


def answers_in_pieces(rows: Sequence[wire.AnswersRow], size: int = 500) -> list[list[wire.AnswersRow]]:
    """The rows in chunks small enough for any service's upload limit."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _detail(answer: httpx.Response) -> str:
    try:
        return Problem.model_validate_json(answer.content).detail
    except ValidationError:
        return " ".join(answer.text[: 4 * QUOTED_CHARS].split())[:QUOTED_CHARS] or answer.reason_phrase


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return max(0.0, float(answer.headers.get("retry-after", "0")))
    except ValueError:
        return 0.0
