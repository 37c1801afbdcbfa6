"""The administrators' routes: uploads, progress, rankings, agreement, people. For API keys, and people with the admin
role."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import batches, files, people
from plaudit.ranking_service.store.batches import stamp
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.schema import batches as batches_table
from plaudit.ranking_service.store.statistics import agreement_of
from plaudit.ranking_service.web import view
from plaudit.ranking_service.web.limits import MAX_FORM_BYTES, read_body
from plaudit.ranking_service.web.people_routes import People, _form, parsed
from plaudit.ranking_service.web.security import Caller, require_csrf, require_same_site
from plaudit.wire import rankings as wire


@dataclass(frozen=True)
class _Counted:
    last_seq: int
    at: float
    took_s: float
    report: wire.AgreementReport


@dataclass
class Admin:
    """What the administrators' routes share."""

    people: People
    public_url: str | None
    max_body_bytes: int
    _reports: dict[str, "_Counted"] = field(default_factory=dict)
    _counting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def database(self) -> Database:
        """The annotators' database."""
        return self.people.database

    async def agreement(self, batch: str, *, may_be_old: bool = False) -> wire.AgreementReport:
        """The statistics of a batch, recomputed only if there are new submissions.

        With `may_be_old`, a new report is computed at most a tenth of the time, and an older one is returned otherwise.
        """
        async with self._counting:  # one at a time: each takes a whole core
            progress = await self.people.read(lambda c: batches.progress(c, batch))
            known = self._reports.get(batch)
            began = time.monotonic()
            kept = known is not None and (
                known.last_seq == progress.last_seq or (may_be_old and began < known.at + 10 * known.took_s)
            )
            if known is None or not kept:
                report = await run_in_threadpool(agreement_of, self.database, batch)
                now = time.monotonic()
                known = self._reports[batch] = _Counted(progress.last_seq, now, now - began, report)
            return known.report

    def forget_reports(self) -> None:
        """Clear the cached reports, because pseudonyms have changed."""
        self._reports.clear()

    def link(self, request: Request, token: str) -> str:
        """The public link of an invitation."""
        base = self.public_url or str(request.base_url)
        return f"{base.rstrip('/')}{wire.INVITATION_PATH}/{token}"


def routes(shared: Admin) -> APIRouter:
    """The router of the administrators' routes."""
    router = APIRouter()
    access = shared.people.access

    async def admin(request: Request) -> Caller | None:
        caller = await run_in_threadpool(access.require_admin, request)
        if caller is not None and caller.session is not None and request.method not in ("GET", "HEAD"):
            require_same_site(request)
            require_csrf(caller, request.headers.get("x-csrf-token", ""))
        return caller

    def who(caller: Caller | None) -> int | None:
        return None if caller is None else caller.person.seq

    @router.post(wire.BATCHES_PATH)
    async def upload(request: Request) -> Response:
        caller = await admin(request)
        body = await read_body(request, shared.max_body_bytes)
        wanted = await run_in_threadpool(parsed, wire.BatchUpload, body)
        done = await shared.people.write(
            lambda c: batches.upload(shared.database, c, wanted, now_ms(), actor=who(caller))
        )
        return JSONResponse(done.model_dump(), status_code=201 if done.added else 200)

    @router.get(wire.BATCHES_PATH)
    async def list_batches(request: Request) -> Response:
        await admin(request)
        return JSONResponse(
            await shared.people.read(lambda c: [batches.progress(c, b).model_dump() for b in batches.listed(c)])
        )

    @router.get(wire.BATCHES_PATH + "/{batch}")
    async def one_batch(batch: str, request: Request) -> Response:
        await admin(request)
        return JSONResponse((await shared.people.read(lambda c: batches.progress(c, batch))).model_dump())

    @router.post(wire.BATCHES_PATH + "/{batch}/{action}")
    async def change(batch: str, action: str, request: Request) -> Response:
        caller = await admin(request)
        await shared.people.write(lambda c: _changed(c, batch, action, who(caller)))
        return JSONResponse((await shared.people.read(lambda c: batches.progress(c, batch))).model_dump())

    @router.get(wire.BATCHES_PATH + "/{batch}/rankings")
    async def rankings(batch: str, request: Request) -> Response:
        await admin(request)
        after = _number(request.query_params, "after", 0, 2**62)
        limit = _number(request.query_params, "limit", 1000, wire.MAX_PAGE)
        late = request.query_params.get("late", "false") == "true"
        until = await run_in_threadpool(files.last_seq, shared.database)
        await shared.people.read(lambda c: _must_exist(c, batch))
        page = await shared.people.read(
            lambda c: files.page(c, batch, after=after, until=until, limit=max(1, limit), late=late)
        )
        return Response(page.model_dump_json(), media_type="application/json")

    @router.get(wire.BATCHES_PATH + "/{batch}/agreement")
    async def agreement(batch: str, request: Request) -> Response:
        await admin(request)
        return JSONResponse((await shared.agreement(batch)).model_dump())

    @router.post(wire.ANNOTATORS_PATH)
    async def invite(request: Request) -> Response:
        caller = await admin(request)
        wanted = parsed(wire.Invite, await read_body(request, MAX_FORM_BYTES))
        pseudonym, token = await shared.people.write(lambda c: people.invite(c, wanted, now_ms(), actor=who(caller)))
        made = wire.Invited(annotator=pseudonym, role=wanted.role, token=token, link=shared.link(request, token))
        return JSONResponse(made.model_dump(), status_code=201)

    @router.get(wire.ANNOTATORS_PATH)
    async def everybody(request: Request) -> Response:
        await admin(request)
        listed = await shared.people.read(people.everybody)
        return JSONResponse([info.model_dump() for info in listed])

    @router.post(wire.ANNOTATORS_PATH + "/{pseudonym}/link")
    async def new_link(pseudonym: str, request: Request) -> Response:
        caller = await admin(request)
        token = await shared.people.write(lambda c: people.new_link(c, pseudonym, now_ms(), actor=who(caller)))
        return JSONResponse({"annotator": pseudonym, "token": token, "link": shared.link(request, token)})

    @router.delete(wire.ANNOTATORS_PATH + "/{pseudonym}")
    async def forget(pseudonym: str, request: Request) -> Response:
        caller = await admin(request)
        await shared.people.write(lambda c: people.delete_person(c, pseudonym, now_ms(), actor=who(caller)))
        shared.forget_reports()
        return Response(status_code=204)

    @router.get("/admin")
    async def overview(request: Request) -> Response:
        try:
            caller = await admin(request)
        except ProblemError as problem:
            if problem.status == 401:
                alert = "Sign in with an administrator's invitation link to see this page."
                return view.page("welcome.html", status=401, alert=alert, kept={}, then="")
            raise
        found = await shared.people.read(lambda c: [batches.progress(c, b) for b in batches.listed(c)])
        reports = {batch.id: await shared.agreement(batch.id, may_be_old=True) for batch in found if batch.counted}
        listed = await shared.people.read(people.everybody)
        return view.page(
            "admin.html",
            batches=found,
            reports=reports,
            people={info.annotator: info for info in listed},
            csrf="" if caller is None else caller.csrf,
            now=stamp(now_ms()),
            can_act=caller is not None,
        )

    @router.post("/admin/batches/{batch}/{action}")
    async def change_from_page(batch: str, action: str, request: Request) -> Response:
        require_same_site(request)
        form = _form(request, await read_body(request, MAX_FORM_BYTES)) or {}
        caller = await run_in_threadpool(access.require_admin, request)
        if caller is not None:
            require_csrf(caller, form.get("csrf", ""))
        await shared.people.write(lambda c: _changed(c, batch, action, who(caller)))
        return RedirectResponse("/admin", status_code=303)

    return router


def _changed(connection: Any, batch: str, action: str, actor: int | None) -> None:
    changes = {"close": batches.close, "reopen": batches.reopen}
    if action not in changes:
        raise ProblemError("not-found", f"{action!r} is not an action on a batch; use close or reopen")
    changes[action](connection, batch, now_ms(), actor=actor)


def _must_exist(connection: Any, batch: str) -> None:
    if connection.execute(select(batches_table.c.id).where(batches_table.c.id == batch)).first() is None:
        raise ProblemError("not-found", f"there is no batch {batch!r}")


def _number(query: Mapping[str, str], name: str, default: int, highest: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit()) or int(given) > highest:
        raise ProblemError("invalid-request", f"{name}={given!r} is not a whole number from 0 to {highest}")
    return int(given)
