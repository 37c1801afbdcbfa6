"""The one route that carries the load, past the framework's request machinery: that would cost half of the throughput.

It runs the same handler as the ordinary route beside it, so both give the same answers and refusals. The ordinary one
is what `/docs` describes, and what serves where the application is mounted under a prefix.
"""

from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]
Refusal = Callable[[Request, Exception], Awaitable[Response]]


class HotRoute:
    """ASGI middleware that answers `POST path` with `handler`; `refusals` turn what it raises into answers."""

    def __init__(self, app: ASGIApp, path: str, handler: Handler, refusals: Mapping[type[Exception], Refusal]) -> None:
        self._app = app
        self._path = path
        self._handler = handler
        self._refusals = dict(refusals)
        self._expected = tuple(refusals)
        self._route = SimpleNamespace(path=path)  # what the gate counts answers by

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = self._route
        request = Request(scope, receive, send)
        try:
            response = await self._handler(request)
        except self._expected as error:
            response = await self._refusals[type(error)](request, error)
        await response(scope, receive, send)
