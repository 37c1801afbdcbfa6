"""The ASGI application: annotators' and administrators' routes, behind rate limits, counts and security headers.

Handlers parse and wait; every database access runs in a thread.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from sqlalchemy import func, select
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plaudit.ranking_service.problems import RETRY_AFTER_S, ProblemError
from plaudit.ranking_service.store import batches
from plaudit.ranking_service.store.database import Database, StoreUnavailableError
from plaudit.ranking_service.store.schema import batches as batches_table
from plaudit.ranking_service.web import admin_routes, people_routes, view
from plaudit.ranking_service.web.admin_routes import Admin
from plaudit.ranking_service.web.limits import ClientGoneError, RateLimiter
from plaudit.ranking_service.web.metrics import Metrics
from plaudit.ranking_service.web.people_routes import People, wants_json
from plaudit.ranking_service.web.security import AccessControl
from plaudit.serving.problems import CONTENT_TYPE

LIVEZ_PATH = "/livez"
READYZ_PATH = "/readyz"
METRICS_PATH = "/metrics"
UNLIMITED = frozenset({LIVEZ_PATH, READYZ_PATH})
FIXED_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
)
MACHINE_PREFIXES = ("/v1/", METRICS_PATH, LIVEZ_PATH, READYZ_PATH, "/static/")
"""Paths whose errors are always problem documents, whatever `Accept` says."""


@dataclass(frozen=True)
class Options:
    """The settings that the application needs; see `Serve`."""

    api_keys: Sequence[str] = ()
    public_url: str | None = None
    secure_cookies: bool = True
    session_hours: float = 24.0
    requests_per_minute: int = 600
    requests_per_minute_address: int = 3000
    max_body_bytes: int = 64 * 1024 * 1024


def create_app(database: Database, options: Options | None = None) -> FastAPI:
    """The application over a migrated database."""
    options = options or Options()
    metrics = Metrics()
    access = AccessControl(
        database, options.api_keys, secure=options.secure_cookies, session_hours=options.session_hours
    )
    app = FastAPI(
        title="Plaudit ranking service",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.draining = False
    app.state.metrics = metrics
    shared = People(database, access, metrics, RateLimiter(options.requests_per_minute))
    app.include_router(people_routes.routes(shared))
    app.include_router(admin_routes.routes(Admin(shared, options.public_url, options.max_body_bytes)))
    app.add_middleware(AccessMiddleware, app_state=app.state, limits=RateLimiter(options.requests_per_minute_address))
    app.add_exception_handler(ProblemError, _refuse)
    app.add_exception_handler(StoreUnavailableError, _refuse)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.add_exception_handler(HTTPException, _http_exception)

    @app.get(LIVEZ_PATH)
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(READYZ_PATH)
    async def readyz() -> dict[str, str]:
        if app.state.draining:
            raise ProblemError("draining", "the service is shutting down", retry_after_s=1)
        try:
            await run_in_threadpool(database.ping)
        except StoreUnavailableError as error:
            raise ProblemError("not-ready", str(error), retry_after_s=RETRY_AFTER_S) from None
        return {"status": "ok"}

    @app.get(METRICS_PATH)
    async def exposition(request: Request) -> Response:
        await run_in_threadpool(access.require_admin, request)
        await run_in_threadpool(_count_batches, database, metrics)
        return Response(metrics.exposition(), headers={"content-type": Metrics.content_type})

    return app


class AccessMiddleware:
    """What every request passes: rate limit of its address, security headers, counts. An unexpected error gives 500."""

    def __init__(self, app: ASGIApp, app_state: object, limits: RateLimiter) -> None:
        self._app = app
        self._state = app_state
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics: Metrics = self._state.metrics  # type: ignore[attr-defined]
        request_id = secrets.token_hex(8).encode()
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = message["headers"]
                headers.append((b"x-request-id", request_id))
                headers.extend(FIXED_HEADERS)
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append((b"cache-control", b"no-store"))
                if self._state.draining:  # type: ignore[attr-defined]
                    headers.append((b"connection", b"close"))
                route = scope.get("route")
                path = route.path if route is not None else "unknown"
                metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        if scope["path"] not in UNLIMITED:
            try:
                self._limits.take(str((scope.get("client") or ("unknown",))[0]))
                if "\x00" in scope["path"]:  # no route has it, and PostgreSQL refuses text with it
                    raise ProblemError("not-found", "no path contains a NUL character")
            except ProblemError as problem:
                metrics.refused.labels(problem.name).inc()
                await problem_response(problem)(scope, receive, send_with_headers)
                return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            if not begun:
                failed = ProblemError("internal-error", "the service failed; its log says where")
                await problem_response(failed)(scope, receive, send_with_headers)
            raise


def problem_response(problem: ProblemError) -> Response:
    """`problem` as `application/problem+json`."""
    return Response(problem.body(), problem.status, problem.headers(), CONTENT_TYPE)


def _refuse(request: Request, error: Exception) -> Response:
    problem = (
        error
        if isinstance(error, ProblemError)
        else ProblemError("store-unavailable", str(error), retry_after_s=RETRY_AFTER_S)
    )
    request.app.state.metrics.refused.labels(problem.name).inc()
    if wants_json(request) or request.url.path.startswith(MACHINE_PREFIXES) or "text/html" not in _accepted(request):
        return problem_response(problem)
    if problem.name == "session-ended":
        alert = "You are not signed in. Paste your invitation link to continue."
        return view.page("welcome.html", status=problem.status, alert=alert, kept={}, then="")
    return view.page("problem.html", status=problem.status, headers=problem.headers(), detail=problem.detail)


def _accepted(request: Request) -> str:
    return request.headers.get("accept", "")


def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    name = "method-not-allowed" if error.status_code == 405 else "not-found"
    return _refuse(request, ProblemError(name, f"{request.method} {request.url.path}: {str(error.detail).lower()}"))


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def _count_batches(database: Database, metrics: Metrics) -> None:
    with database.read() as connection:
        open_ones = select(func.count()).select_from(batches_table).where(batches_table.c.closed_at.is_(None))
        metrics.open_batches.set(connection.execute(open_ones).scalar_one())
        for identity in batches.listed(connection):
            progress = batches.progress(connection, identity)
            metrics.rankings_wanted.labels(identity).set(progress.wanted)
            metrics.rankings_counted.labels(identity).set(progress.counted)
