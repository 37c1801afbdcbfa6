"""`POST /v1/rewards`: read the body, validate it, have it scored, answer.

This route carries the load, so `FastRouteMiddleware` calls its handler without the framework's request machinery: that
would halve the throughput. The ordinary route runs the same handler: it is the one that `/docs` describes, and it
serves an application that is mounted under a prefix.

Failure modes: the two routes answer differently; a refusal does not name the item at fault.
"""

from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace

import msgpack
from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from plaudit import wire
from plaudit.reward_service.engine.batching import Scored
from plaudit.reward_service.http.body import read_document
from plaudit.reward_service.http.openapi import JSON_TYPE
from plaudit.reward_service.http.service import Service
from plaudit.reward_service.http.validation import validated
from plaudit.reward_service.problems import ProblemError

MSGPACK_TYPES = ("application/msgpack", "application/vnd.msgpack", "application/x-msgpack")
Handler = Callable[[Request], Awaitable[Response]]
Refusal = Callable[[Request, Exception], Awaitable[Response]]


class FastRouteMiddleware:
    """ASGI middleware that answers `POST path` with `handler`. `refusals` map its exceptions to responses."""

    def __init__(self, app: ASGIApp, path: str, handler: Handler, refusals: Mapping[type[Exception], Refusal]) -> None:
        self._app = app
        self._path = path
        self._handler = handler
        self._refusals = dict(refusals)
        self._expected = tuple(refusals)
        self._route = SimpleNamespace(path=path)  # the route in AccessMiddleware's count of responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the route, or pass the request on."""
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


async def answer_rewards(service: Service, request: Request) -> Response:
    """Read, validate, score, answer. Raises `ProblemError`, and `ClientGoneError` when the client disconnects."""
    content_type = _content_type(request)
    document = await read_document(service, request, msgpack=content_type in MSGPACK_TYPES)
    wanted = validated(*document, service.limits)
    del document
    scored, index = await service.score_items(wanted.items, wanted.label, request)
    return _answer(scored, index, request, content_type)


def _content_type(request: Request) -> str:
    sent = request.headers.get("content-type", JSON_TYPE)
    content_type = sent.split(";")[0].strip().lower()
    if content_type != JSON_TYPE and content_type not in MSGPACK_TYPES:
        raise ProblemError("unsupported-media-type", f"the body is {sent}; send {JSON_TYPE} or {MSGPACK_TYPES[0]}")
    return content_type


def _answer(scored: Scored, index: int, request: Request, content_type: str) -> Response:
    """The response: logit `index` of each row as its reward."""
    answer = wire.RewardResponse(
        rewards=[row[index] for row in scored.logits],
        model=scored.scorer.id,
        revision=scored.scorer.revision,
        label=scored.scorer.labels[index],
        truncated=scored.truncated,
        request_id=request_id_of(request),
    )
    headers = {"server-timing": _server_timing(scored)}
    if _wants_msgpack(request, content_type):
        # Logits are float32 to begin with, so half the bytes lose nothing.
        packed = msgpack.packb(answer.model_dump(exclude=_unasked_fields(answer)), use_single_float=True)
        return Response(packed, media_type=MSGPACK_TYPES[0], headers=headers)
    return json_response(answer, headers)


def _wants_msgpack(request: Request, content_type: str) -> bool:
    """Whether `Accept` names msgpack; without a preference, whether the request came in msgpack."""
    accept = request.headers.get("accept", "*/*")
    if any(name in accept for name in MSGPACK_TYPES):
        return True
    return content_type in MSGPACK_TYPES and JSON_TYPE not in accept


def json_response(answer: wire.RewardResponse, headers: dict[str, str] | None = None) -> Response:
    """The answer as JSON, without the fields that the client didn't ask for."""
    body = answer.__pydantic_serializer__.to_json(answer, exclude=_unasked_fields(answer))
    return Response(body, media_type=JSON_TYPE, headers=headers)


def model_response(service: Service, request: Request) -> Response:
    """The answer to `GET /v1/model`. Only clients that name their version of the wire get its version and fields."""
    info = service.model_info(request_id_of(request))
    unasked = _unasked_fields(info) | (set() if wire.WIRE_HEADER in request.headers else {"wire", "fields"})
    return Response(info.model_dump_json(exclude=unasked), media_type=JSON_TYPE)


def _unasked_fields(answer: wire.RewardResponse | wire.ModelInfo) -> set[str]:
    """Fields to leave out: older clients, which don't ask for them, refuse unknown fields."""
    return {"request_id"} if answer.request_id is None else set()


def request_id_of(request: Request) -> str | None:
    """The value of `Plaudit-Request-Id`; None without it. Raises `ProblemError`."""
    sent = request.headers.get(wire.REQUEST_ID_HEADER)
    if sent is None:
        return None
    if not (0 < len(sent) <= wire.MAX_REQUEST_ID_CHARS and sent.isascii() and sent.isprintable()):
        raise ProblemError(
            "invalid-request",
            f"{wire.REQUEST_ID_HEADER} has {len(sent)} characters; send 1 to {wire.MAX_REQUEST_ID_CHARS} printable "
            "ASCII characters",
        )
    return sent


def _server_timing(scored: Scored) -> str:
    """The `Server-Timing` header: milliseconds in each phase."""
    phases = (("tokenize", scored.tokenize_s), ("queue", scored.queue_s), ("inference", scored.inference_s))
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in phases)
