"""The annotators' routes. The same URLs answer a browser with pages and a program with JSON.

A refused submission comes back as the filled form. A submission that can't be stored now comes back as a page that can
send it again.

Failure modes: input that a person has typed is lost; a submission is stored twice.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, func, select
from starlette.concurrency import run_in_threadpool

from plaudit.ranking_service.problems import RETRY_AFTER_S, ProblemError
from plaudit.ranking_service.store import leases, people, submissions
from plaudit.ranking_service.store.batches import stamp
from plaudit.ranking_service.store.database import Database, StoreUnavailableError, now_ms
from plaudit.ranking_service.store.schema import assignments, tasks
from plaudit.ranking_service.store.submissions import ConflictError, Judgement, ShownTask
from plaudit.ranking_service.web import view
from plaudit.ranking_service.web.limits import MAX_FORM_BYTES, RateLimiter, read_body
from plaudit.ranking_service.web.metrics import Metrics
from plaudit.ranking_service.web.security import AccessControl, Caller, bearer_token, require_csrf, require_same_site
from plaudit.wire import rankings as wire

T = TypeVar("T")
RANK_FIELD = "rank."
PROGRESS_FOR_S = 5.0
"""How long a batch's progress is cached."""
MAX_FIELDS = 200
MINE = 100
"""The number of rankings that /mine lists."""
KEEPABLE = ("csrf", "session-ended", "too-many-requests", "store-unavailable")
"""Refusals that don't depend on the submission, so that a retry may succeed."""
Message: TypeAlias = wire.RankingSubmit | wire.SkipSubmit | wire.FlagSubmit
ACTIONS: Mapping[str, type[Message]] = {
    "ranking": wire.RankingSubmit,
    "skip": wire.SkipSubmit,
    "flag": wire.FlagSubmit,
    "undo": wire.SkipSubmit,
}


@dataclass
class People:
    """What the annotators' routes share."""

    database: Database
    access: AccessControl
    metrics: Metrics
    per_person: RateLimiter
    _progress: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    async def caller(self, request: Request) -> Caller:
        """The signed-in person, within their rate limit. Raises `ProblemError`, `session-ended` without a session."""
        caller = await run_in_threadpool(self.access.caller, request)
        if caller is None:
            raise ProblemError("session-ended", "you are not signed in; open your invitation link again")
        self.per_person.take(str(caller.person.seq))
        return caller

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a reading transaction, off the event loop."""

        def run() -> T:
            with self.database.read() as connection:
                return work(connection)

        return await run_in_threadpool(run)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a writing transaction, off the event loop."""

        def run() -> T:
            with self.database.write() as connection:
                return work(connection)

        return await run_in_threadpool(run)

    def progress(self, connection: Connection, person: int, batch: str) -> view.Progress:
        """The person's progress now, and the batch's as of up to `PROGRESS_FOR_S` ago."""
        mine = connection.execute(
            select(func.count())
            .select_from(assignments)
            .where(assignments.c.annotator == person, assignments.c.state != "open")
        ).scalar_one()
        counted_at, done, wanted = self._progress.get(batch, (0.0, 0, 0))
        now = time.monotonic()
        if batch and now - counted_at > PROGRESS_FOR_S:
            in_use = (tasks.c.batch == batch) & tasks.c.state.in_(("open", "done"))
            wanted = connection.execute(select(func.sum(tasks.c.wanted)).where(in_use)).scalar() or 0
            done = connection.execute(
                select(func.count())
                .select_from(assignments.join(tasks, assignments.c.task == tasks.c.seq))
                .where(in_use, assignments.c.state == "counted")
            ).scalar_one()
            self._progress[batch] = now, done, wanted
        return view.Progress(mine, done, wanted)

    def task_page(self, connection: Connection, caller: Caller, shown: ShownTask, **more: Any) -> Response:
        """The page of a task for this person."""
        person = caller.person
        undo = next(
            (
                (found[0], found[1])
                for found in submissions.newest_of(connection, person.seq)
                if found[0] != shown.assignment
            ),
            None,
        )
        return view.task_page(
            shown,
            csrf=caller.csrf,
            who=person.pseudonym,
            admin=person.role == "admin",
            progress=self.progress(connection, person.seq, shown.batch),
            undo=undo,
            **more,
        )


def wants_json(request: Request) -> bool:
    """Whether the client is a program: it doesn't accept HTML, and accepts JSON or sends a bearer token."""
    accepted = request.headers.get("accept", "")
    if "text/html" in accepted:
        return False
    return "application/json" in accepted or bearer_token(request) is not None


def routes(shared: People) -> APIRouter:
    """The router of the annotators' routes."""
    router = APIRouter()

    @router.get("/")
    async def next_task(request: Request) -> Response:
        try:
            caller = await shared.caller(request)
        except ProblemError as problem:
            if problem.name == "session-ended" and not wants_json(request):
                return view.page("welcome.html", alert="", kept={}, then="")
            raise
        person = caller.person
        shown = await shared.write(lambda c: _next(c, person.seq))
        if shown is None:
            return await shared.read(lambda c: _nothing(c, caller, wants_json(request)))
        shared.metrics.handed_out.inc()
        if wants_json(request):
            return JSONResponse(task_view(shown).model_dump())
        return await shared.read(lambda c: shared.task_page(c, caller, shown))

    def _next(connection: Connection, person: int) -> ShownTask | None:
        identity = leases.next_assignment(connection, person, now_ms())
        return None if identity is None else submissions.show(connection, person, identity)

    def _nothing(connection: Connection, caller: Caller, as_json: bool) -> Response:
        waiting = leases.anything_left(connection, caller.person.seq)
        if as_json:
            return JSONResponse(wire.NoTask(waiting=waiting).model_dump())
        mine = shared.progress(connection, caller.person.seq, "").mine
        return view.page("done.html", waiting=waiting, mine=mine, admin=caller.person.role == "admin", csrf=caller.csrf)

    def _shown(connection: Connection, caller: Caller, identity: str, as_json: bool) -> Response:
        shown = submissions.show(connection, caller.person.seq, identity)
        if as_json:
            return JSONResponse(task_view(shown).model_dump())
        return shared.task_page(connection, caller, shown)

    @router.get("/a/{assignment}")
    async def one_task(assignment: str, request: Request) -> Response:
        caller = await shared.caller(request)
        return await shared.read(lambda c: _shown(c, caller, assignment, wants_json(request)))

    @router.put("/a/{assignment}/draft")
    async def draft(assignment: str, request: Request) -> Response:
        require_same_site(request)
        body = await read_body(request, MAX_FORM_BYTES)
        caller = await shared.caller(request)
        require_csrf(caller, request.headers.get("x-csrf-token", ""))
        wanted = parsed(wire.DraftSave, body)
        seq = caller.person.seq
        saved = await shared.write(
            lambda c: submissions.save_draft(shared.database, c, seq, assignment, wanted, now_ms())
        )
        return JSONResponse(saved.model_dump())

    @router.post("/a/{assignment}/{action}")
    async def submit(assignment: str, action: str, request: Request) -> Response:
        if action not in ACTIONS:
            raise ProblemError("not-found", f"there is nothing at {request.url.path}")
        require_same_site(request)
        body = await read_body(request, MAX_FORM_BYTES)
        form = _form(request, body)
        caller: Caller | None = None
        word: Judgement | None = None
        try:
            caller = await shared.caller(request)
            require_csrf(caller, form.get("csrf", "") if form is not None else request.headers.get("x-csrf-token", ""))
            message: Message = parsed(ACTIONS[action], body) if form is None else _from_form(action, form)
            word = _word(action, message)
            began = time.monotonic()
            accepted = await shared.write(
                lambda c: submissions.submit(
                    shared.database,
                    c,
                    caller.person.seq,
                    assignment,
                    message.key,
                    message.version,
                    word,
                    now_ms(),
                )
            )
            shared.metrics.submit_seconds.observe(time.monotonic() - began)
        except (ProblemError, StoreUnavailableError) as problem:
            if form is None or wants_json(request):
                raise
            return await _refused_form(_as_problem(problem), caller, assignment, action, form)
        (shared.metrics.replays if accepted.replayed else shared.metrics.submissions.labels(accepted.status)).inc()
        if wants_json(request) or form is None:
            return JSONResponse(accepted.model_dump())
        return RedirectResponse(f"/a/{assignment}" if action == "undo" else "/", status_code=303)

    async def _refused_form(
        problem: ProblemError, caller: Caller | None, assignment: str, action: str, form: Mapping[str, str]
    ) -> Response:
        """The filled form again or, if the task can't be read now, a page that keeps the input."""
        headers = problem.headers()
        filled = Judgement("ranking", _form_ranks(form), _form_flags(form), form.get("note", "")[: wire.MAX_NOTE_CHARS])
        if caller is not None and problem.name not in ("too-many-requests", "store-unavailable"):
            try:
                return await shared.read(
                    lambda c: shared.task_page(
                        c,
                        caller,
                        submissions.show(c, caller.person.seq, assignment),
                        word=filled,
                        alert=_in_plain_words(problem),
                        recorded=problem.shown.current if isinstance(problem, ConflictError) else None,
                        status=problem.status,
                        headers=headers,
                    )
                )
            except StoreUnavailableError as error:
                problem = _as_problem(error)
            except ProblemError as error:
                problem = error
        return _kept(problem, form, f"/a/{assignment}/{action}")

    @router.get("/i/{token}")
    async def invitation(token: str) -> Response:
        # Changes nothing: messengers fetch links to show a preview.
        person = await shared.read(lambda c: people.by_token(c, token))
        if person is None:
            return view.page("welcome.html", status=404, alert=UNKNOWN_LINK, kept={}, then="")
        return view.page("invitation.html", token=token)

    @router.post("/i/{token}")
    async def accept(token: str, request: Request) -> Response:
        require_same_site(request)
        response: Response = RedirectResponse("/", status_code=303)
        if await run_in_threadpool(shared.access.sign_in, token, response) is None:
            return view.page("welcome.html", status=404, alert=UNKNOWN_LINK, kept={}, then="")
        return response

    @router.post("/i")
    async def accept_pasted(request: Request) -> Response:
        """Sign in with a pasted link, and continue with the form that came with it."""
        require_same_site(request)
        form = _form(request, await read_body(request, MAX_FORM_BYTES)) or {}
        token = form.get("link", "").strip().rstrip("/").rpartition("/")[2]
        kept = {name: value for name, value in form.items() if name not in ("link", "then", "csrf")}
        then = form.get("then", "")
        response: Response = RedirectResponse("/", status_code=303)
        person = await run_in_threadpool(shared.access.sign_in, token, response) if token else None
        if person is None:
            return view.page("welcome.html", status=404, alert=UNKNOWN_LINK, kept=kept, then=then)
        if not then.startswith("/a/") or not kept:
            return response
        cookie = response.headers["set-cookie"]
        session = cookie.partition("=")[2].partition(";")[0]
        filled = Judgement("ranking", _form_ranks(kept), _form_flags(kept), kept.get("note", "")[: wire.MAX_NOTE_CHARS])
        caller = Caller(person, session)
        alert = "You are signed in again, and nothing is lost. Check your ranking and send it."
        try:
            again = await shared.read(
                lambda c: shared.task_page(
                    c, caller, submissions.show(c, person.seq, then.split("/")[2]), word=filled, alert=alert
                )
            )
        except ProblemError:  # another person's link: show their own next task
            return response
        again.headers.append("set-cookie", cookie)
        return again

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        require_same_site(request)
        form = _form(request, await read_body(request, MAX_FORM_BYTES)) or {}
        caller = await shared.caller(request)
        require_csrf(caller, form.get("csrf", ""))
        response = RedirectResponse("/", status_code=303)
        await run_in_threadpool(shared.access.sign_out, caller, response)
        return response

    @router.get("/mine")
    async def mine(request: Request) -> Response:
        caller = await shared.caller(request)
        listed = await shared.read(lambda c: submissions.newest_of(c, caller.person.seq, MINE))
        if wants_json(request):
            names = ("assignment", "version", "status", "at")
            return JSONResponse([dict(zip(names, (a, v, s, stamp(at)), strict=True)) for a, v, s, at in listed])
        rows = [(a, v, s, stamp(at), wire.content_hash("undo", a, v)) for a, v, s, at in listed]
        admin = caller.person.role == "admin"
        return view.page("mine.html", rows=rows, who=caller.person.pseudonym, csrf=caller.csrf, admin=admin)

    @router.get("/static/{name}")
    async def static(name: str) -> Response:
        found = view.static_files().get(name)
        if found is None:
            raise ProblemError("not-found", f"there is no file {name!r}")
        headers = {"cache-control": "public, max-age=31536000, immutable"}
        return Response(found[0], media_type=found[1], headers=headers)

    return router


UNKNOWN_LINK = "This link is not valid. It may be mistyped, or replaced by a newer one; ask the person who invited you."


def task_view(shown: ShownTask) -> wire.TaskView:
    """A task as JSON for programs."""
    filled = shown.draft or shown.current or Judgement("ranking")
    return wire.TaskView(
        assignment=shown.assignment,
        task=shown.task,
        batch=shown.batch,
        prompt=shown.prompt,
        answers=shown.answers,
        ranks=dict(filled.ranks),
        note=filled.note,
        key=shown.key,
        version=shown.version,
        lease_until=stamp(shown.lease_until),
    )


def parsed(kind: type[T], body: bytes) -> T:
    """The message in a body, or a `ProblemError` that names the field at fault."""
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        problem = invalid(error)
    if problem.name == "malformed-body":
        # JSON may escape half of a surrogate pair, which is not text. Python's parser accepts it, and validation then
        # names the field.
        try:
            adapter.validate_python(json.loads(body))
        except ValidationError as error:
            problem = invalid(error)
        except (ValueError, RecursionError):
            pass
    raise problem


def invalid(error: ValidationError) -> ProblemError:
    """The refusal for the first error. Rows of an upload are counted from 1."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ProblemError("malformed-body", first["msg"])
    location = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if location[:1] == ["rows"] and len(location) > 1:
        number = int(location[1]) + 1
        where = ".".join(location[2:])
        detail = f"row {number}: {where + ': ' if where else ''}{message}; nothing was taken"
        return ProblemError("invalid-row", detail, row=number)
    return ProblemError("invalid-request", f"{'.'.join(location) or 'the body'}: {message}")


def _form(request: Request, body: bytes) -> dict[str, str] | None:
    """The fields of a form, or None for JSON. A repeated field is joined by commas."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return None
    if kind != "application/x-www-form-urlencoded" and body:
        raise ProblemError("unsupported-media-type", f"{kind or 'no media type'} is not supported; send a form or JSON")
    fields: dict[str, str] = {}
    try:
        for name, value in parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"):
            # Browsers send line ends as CRLF; the page's own script sends what was typed.
            text = value.replace("\r\n", "\n")
            fields[name] = f"{fields[name]},{text}" if name in fields else text
    except ValueError as error:
        raise ProblemError("malformed-body", f"the body is not a form: {error}") from None
    return fields


def _form_ranks(form: Mapping[str, str]) -> dict[str, int]:
    return {
        name.removeprefix(RANK_FIELD): int(value)
        for name, value in form.items()
        if name.startswith(RANK_FIELD) and value.isascii() and value.isdigit() and len(value) < 4
    }


def _form_flags(form: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(flag for flag in form.get("flags", "").split(",") if flag in view.FLAGS)


def _from_form(action: str, form: Mapping[str, str]) -> Message:
    values: dict[str, Any] = {"key": form.get("key", ""), "version": form.get("version", "")}
    if action == "ranking":
        values |= {"ranks": _form_ranks(form), "note": form.get("note", ""), "seconds": form.get("seconds") or None}
    elif action == "flag":
        flags = _form_flags(form)
        if not flags:
            raise ProblemError("invalid-request", "choose at least one reason for the flag")
        values |= {"flags": list(flags), "note": form.get("note", "")}
    try:
        return ACTIONS[action].model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


def _word(action: str, message: Message) -> Judgement:
    if isinstance(message, wire.RankingSubmit):
        return Judgement("ranking", message.ranks, note=message.note, seconds=message.seconds)
    if isinstance(message, wire.FlagSubmit):
        return Judgement("flag", flags=tuple(message.flags), note=message.note)
    return Judgement("skip" if action == "skip" else "withdraw")


def _as_problem(error: ProblemError | StoreUnavailableError) -> ProblemError:
    if isinstance(error, ProblemError):
        return error
    return ProblemError("store-unavailable", str(error), retry_after_s=RETRY_AFTER_S)


def _in_plain_words(problem: ProblemError) -> str:
    said = {
        "incomplete-ranking": "Give every answer a rank first. Equal ranks are ties.",
        "edited-elsewhere": "You have submitted another ranking of this task in another tab. Nothing was changed now: "
        "send the form to replace what is recorded.",
        "key-reused": "This form was sent before, with another ranking. Send it again to replace what is recorded.",
        "csrf": "Your session has changed since the page was opened. Nothing is lost: check your ranking and send it.",
    }
    return said.get(problem.name, problem.detail[:1].upper() + problem.detail[1:] + ".")


def _kept(problem: ProblemError, form: Mapping[str, str], then: str) -> Response:
    kept = {name: value for name, value in form.items() if name != "csrf"}
    if problem.name == "session-ended":
        alert = "Your session has ended. Your ranking is kept in this page: paste your invitation link to continue."
        return view.page("welcome.html", status=problem.status, alert=alert, kept=kept, then=then)
    return view.page(
        "again.html",
        status=problem.status,
        headers=problem.headers(),
        detail=problem.detail,
        kept=dict(form),
        then=then,
    )
