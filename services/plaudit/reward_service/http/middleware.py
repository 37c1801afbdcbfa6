"""What every request passes before its route: bound on the head, authentication, request id, count of responses.

Failure modes: a request served without a valid key; a request that is in no metric.
"""

import random
from collections.abc import Callable, Mapping

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plaudit import wire
from plaudit.reward_service import protocols as compat
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http import tracing
from plaudit.reward_service.http.request_head import OVER_CONNECTION_LIMIT, REFUSED, head_bytes, head_too_large
from plaudit.reward_service.http.service import CALLER, RESERVATION
from plaudit.reward_service.keys import Keys
from plaudit.reward_service.problems import ProblemError
from plaudit.serving.server import MAX_HEAD_BYTES

PUBLIC_PATHS = frozenset({wire.LIVEZ_PATH, wire.READYZ_PATH}) | compat.HEALTH_PATHS
"""The routes that need no key: health probes, and nothing else."""
RELOAD_PATH = "/v1/model:reload"
"""The route that needs an administrator's key."""
INTERNAL_ERROR = ProblemError("internal-error", "the service failed; its log says where")
CONTROLS = bytes([*range(32), 127])
"""Bytes that a header must not contain."""


class AccessMiddleware:
    """Access control, request ids and counts. Plain ASGI, because BaseHTTPMiddleware would halve the throughput."""

    def __init__(self, app: ASGIApp, keys: Keys, engine: Engine) -> None:
        self._app = app
        self._keys = keys
        # Not `secrets`: a system call for each request would release the interpreter lock.
        self._ids = random.Random()
        self._engine = engine
        self._metrics = engine.metrics
        self._count: dict[tuple[str, int], Callable[[], None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on; release its memory reservation when it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").translate(None, CONTROLS)[
            :128
        ] or b"%032x" % self._ids.getrandbits(128)

        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"].append((b"x-request-id", request_id))
                if self._engine.draining or OVER_CONNECTION_LIMIT in scope:
                    # The shutdown closes kept connections. Told so, the client sends its next request elsewhere.
                    message["headers"].append((b"connection", b"close"))
                route = scope.get("route")
                path = route.path if route is not None else "unknown"
                counted = path, message["status"]
                if counted not in self._count:
                    self._count[counted] = self._metrics.responses.labels(*counted).inc
                if REFUSED not in scope:
                    self._count[counted]()
            await send(message)

        problem = self._refusal(scope, headers)
        if problem is not None:
            tracing.note_problem(scope, problem)
            self._metrics.refused_requests.labels(problem.name).inc()
            await problem_response(problem)(scope, receive, send_with_id)
            return
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if not begun:
                await problem_response(INTERNAL_ERROR)(scope, receive, send_with_id)
            raise
        finally:
            reservation = scope.get(RESERVATION)
            if reservation is not None:
                reservation.release()

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> ProblemError | None:
        if head_bytes(scope) > MAX_HEAD_BYTES:
            return head_too_large()
        if scope["path"] in PUBLIC_PATHS:
            return None
        if OVER_CONNECTION_LIMIT in scope:
            return scope[OVER_CONNECTION_LIMIT]()  # type: ignore[no-any-return]
        if not self._keys.required:
            scope[CALLER] = str(scope.get("client"))
            return None
        caller = None
        if sum([name == b"authorization" for name, _ in scope["headers"]]) == 1:  # two headers: neither is valid
            caller = self._keys.authenticate(headers[b"authorization"])
        if caller is None:
            return ProblemError("unauthorized", "send a valid key as `Authorization: Bearer KEY`")
        if scope["path"] == RELOAD_PATH and not caller.may_administer:
            return ProblemError(
                "forbidden",
                "a reload needs an administrator's key: start the service with --admin-key-file, or send it SIGHUP",
            )
        scope[CALLER] = caller.name
        return None


def problem_response(problem: ProblemError) -> Response:
    """`problem` as `application/problem+json`."""
    return Response(
        problem.body(), status_code=problem.status, headers=problem.headers(), media_type=wire.PROBLEM_CONTENT_TYPE
    )
