"""The HTTP face of the engine. Checks what comes in, says precisely what is wrong with it, and never invents a score.

Handlers only parse, submit and wait; nothing here runs long enough to hold up the event loop.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from plaudit import wire
from plaudit.reward_service import protocols as compat
from plaudit.reward_service.engine.batching import Engine, Scorer
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.engine.metrics import Metrics
from plaudit.reward_service.http import openapi, tracing
from plaudit.reward_service.http.fast_route import HotRoute
from plaudit.reward_service.http.middleware import INTERNAL_ERROR, PUBLIC_PATHS, RELOAD_PATH, Gate, problem_response
from plaudit.reward_service.http.openapi import JSON_TYPE
from plaudit.reward_service.http.reading import is_small, read_json, read_msgpack
from plaudit.reward_service.http.service import (
    ClientGoneError,
    Service,
    ServiceLimits,
    server_timing,
    too_long,
    too_many,
)
from plaudit.reward_service.keys import Keys
from plaudit.reward_service.problems import ProblemError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

MAX_REPORTED_ERRORS = 10
MAX_PATH_CHARS = 200
REQUEST_FIELDS = frozenset(wire.RewardRequest.model_fields)
ITEM_FIELDS = frozenset(wire.RewardItem.model_fields)
NEITHER = "a string or a list of messages is needed here"
MESSAGE_FIELDS = frozenset(wire.ChatMessage.model_fields)
MSGPACK_TYPES = ("application/msgpack", "application/vnd.msgpack", "application/x-msgpack")
METRICS_PATH = "/metrics"
DESCRIPTION = """Rewards from a sequence classifier: raw logits, chosen by label, in request order.

Errors on `/v1` are `application/problem+json` documents; `type` says which. When the service has keys, every route but
health wants `Authorization: Bearer KEY`. The other tags are foreign protocols over the same engine, their
errors included.
"""
REWARDS_EXAMPLE = {"items": [{"prompt": "This movie", "response": " was wonderful."}], "label": "POSITIVE"}


def create_app(
    engine: Engine,
    *,
    limits: ServiceLimits | None = None,
    default_label: str | None = None,
    join: wire.Join = "concat",
    api_keys: Sequence[str] | Keys = (),
    cache: ScoreCache | None = None,
    reload: Callable[[], Scorer] | None = None,
    traces: "TracerProvider | None" = None,
) -> FastAPI:
    """The ASGI application over a started engine. Without `api_keys` every caller is served.

    `reload` loads the model anew, in a thread, for `POST /v1/model:reload`. With `traces`, every request but probes
    gets a span. `app.state.service` is the `Service`.
    """
    service = Service(engine, limits or ServiceLimits(), default_label, join, cache, reload)
    app = FastAPI(
        title="Plaudit reward service",
        description=DESCRIPTION,
        version="1",
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = service
    app.state.traces = traces
    refusals = {ProblemError: _problem_response, ClientGoneError: _client_gone_response}
    app.add_middleware(HotRoute, path=wire.REWARDS_PATH, handler=partial(answer_rewards, service), refusals=refusals)
    app.state.keys = api_keys if isinstance(api_keys, Keys) else Keys(api_keys)
    app.add_middleware(Gate, keys=app.state.keys, engine=engine)
    if traces is not None:
        app.add_middleware(tracing.Traced, provider=traces, quiet=PUBLIC_PATHS | {METRICS_PATH})
    for kind, refuse in refusals.items():
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(HTTPException, _http_exception_response)
    app.add_exception_handler(Exception, _internal_error_response)
    _add_routes(app, service)
    for router in compat.routers(service):
        app.include_router(router)
    models: list[type[BaseModel]] = [wire.RewardRequest, wire.Problem, *compat.BODIES]
    app.openapi = lambda: openapi.document(app, models)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine
    problems = openapi.refusals(
        s4XX="The request is refused; `type` says why and `item` where.",
        s5XX="No score this time; 503 and 504 are worth another try.",
    )

    @app.post(
        wire.REWARDS_PATH,
        response_model=wire.RewardResponse,
        responses=problems | openapi.also(MSGPACK_TYPES[0], wire.RewardResponse),
        summary="Rewards for prompts and responses",
        openapi_extra=openapi.body([wire.RewardRequest], {"one": REWARDS_EXAMPLE}, MSGPACK_TYPES[0]),
    )
    async def rewards(request: Request) -> Response:
        return await answer_rewards(service, request)

    @app.get(
        wire.MODEL_PATH, response_model=wire.ModelInfo, responses=problems, summary="What is served, and its limits"
    )
    async def model(request: Request) -> Response:
        return _message(service.info(_request_id(request)), told_version=wire.WIRE_HEADER in request.headers)

    @app.post(RELOAD_PATH, response_model=wire.ModelInfo, responses=problems, summary="Read the model's files again")
    async def reload(request: Request) -> Response:
        await service.load_again()
        return _message(service.info(_request_id(request)), told_version=wire.WIRE_HEADER in request.headers)

    @app.get(wire.LIVEZ_PATH, summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        wire.READYZ_PATH,
        responses=openapi.refusals(s503="Draining, or a thread has died; `detail` says which."),
        summary="Worth sending work to",
    )
    async def readyz() -> dict[str, str]:
        reason = engine.unready()
        if reason is not None:
            raise ProblemError("not-ready", reason)
        return {"status": "ok"}

    @app.get(METRICS_PATH, response_class=PlainTextResponse, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), headers={"content-type": Metrics.content_type})


async def answer_rewards(service: Service, request: Request) -> Response:
    """What `POST /v1/rewards` does, by whichever way it came in."""
    content_type = _content_type(request)
    body = await service.read_body(request)
    wanted = await read_rewards_request(body, service.limits, packed=content_type in MSGPACK_TYPES)
    del body
    index = service.label_index(service.engine.scorer, wanted.label)
    scored = await service.score(service.texts(wanted.items), request)
    answer = wire.RewardResponse(
        rewards=[row[index] for row in scored.logits],
        model=scored.scorer.id,
        revision=scored.scorer.revision,
        label=scored.scorer.labels[index],
        truncated=scored.truncated,
        request_id=_request_id(request),
    )
    headers = {"server-timing": server_timing(scored)}
    if _wants_msgpack(request, content_type):
        # Logits are float32 to begin with, so half the bytes lose nothing.
        packed = msgpack.packb(answer.model_dump(exclude=_unasked_fields(answer)), use_single_float=True)
        return Response(packed, media_type=MSGPACK_TYPES[0], headers=headers)
    return _message(answer, headers)


def _message(
    answer: wire.RewardResponse | wire.ModelInfo,
    headers: dict[str, str] | None = None,
    *,
    told_version: bool = True,
) -> Response:
    """`told_version`: whether the client said which version of the wire it speaks."""
    unasked = _unasked_fields(answer) | (set() if told_version else {"wire", "fields"})
    body = answer.__pydantic_serializer__.to_json(answer, exclude=unasked or None)
    return Response(body, media_type=JSON_TYPE, headers=headers)


def _unasked_fields(answer: wire.RewardResponse | wire.ModelInfo) -> set[str]:
    """Fields that older clients don't know, and refuse: they didn't ask for them."""
    return {"request_id"} if answer.request_id is None else set()


def _request_id(request: Request) -> str | None:
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


async def read_rewards_request(body: bytes, limits: ServiceLimits, *, packed: bool = False) -> wire.RewardRequest:
    """The request in `body`, JSON or msgpack (`packed`), or a `ProblemError` that names the first item at fault."""
    try:
        if not packed and is_small(body):
            request = wire.RewardRequest.model_validate_json(body)
        else:
            value = await (read_msgpack if packed else read_json)(body)
            _refuse_what_cannot_be(value, limits)
            request = wire.RewardRequest.model_validate(value)
    except ValidationError as error:
        raise _invalid(error, body, limits) from None
    if len(request.items) > limits.max_items:
        raise too_many(len(request.items), limits)
    if limits.max_text_chars < wire.MAX_TEXT_CHARS:
        for index, item in enumerate(request.items):
            if max(_chars(item.prompt), len(item.response)) > limits.max_text_chars:
                raise too_long(index, limits)
    return request


def _chars(prompt: str | list[wire.ChatMessage]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(message.content) for message in prompt)


def _refuse_what_cannot_be(value: object, limits: ServiceLimits) -> None:
    """Refuse too many items and unknown keys before each of them is validated, and makes an error of its own."""
    if not isinstance(value, dict):
        return
    _refuse_unknown(value, REQUEST_FIELDS, (), None)
    items = value.get("items")
    if isinstance(items, list):
        if len(items) > limits.max_items:
            raise too_many(len(items), limits)
        for index, item in enumerate(items):
            if isinstance(item, dict):
                _refuse_unknown(item, ITEM_FIELDS, ("items", index), index)
                if isinstance(item.get("prompt"), list):
                    _refuse_messages(item["prompt"], index, limits)


def _refuse_messages(messages: list[Any], item: int, limits: ServiceLimits) -> None:
    chars = 0
    for index, message in enumerate(messages[: wire.MAX_MESSAGES + 1]):
        where = ("items", item, "prompt", index)
        if not isinstance(message, dict):
            raise _invalid_item(where, "a message is an object with role and content", item)
        _refuse_unknown(message, MESSAGE_FIELDS, where, item)
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise _invalid_item((*where, name), "a string is needed here", item)
        chars += len(message["content"])
    if len(messages) > wire.MAX_MESSAGES:
        raise _invalid_item(
            ("items", item, "prompt"), f"more than {wire.MAX_MESSAGES} messages; send the newest of them", item
        )
    if chars > limits.max_text_chars:
        raise too_long(item, limits)


def _invalid_item(where: tuple[int | str, ...], message: str, item: int) -> ProblemError:
    errors = [{"path": _path(where), "message": message}]
    return ProblemError("invalid-request", f"{_path(where)}: {message}", item=item, errors=errors)


def _refuse_unknown(
    value: dict[Any, Any], known: frozenset[str], where: tuple[int | str, ...], item: int | None
) -> None:
    if known.issuperset(value):
        return
    unknown = [_path((*where, str(key))) for key in value if key not in known][:MAX_REPORTED_ERRORS]
    message = "Extra inputs are not permitted"
    errors = [{"path": path, "message": message} for path in unknown]
    raise ProblemError("invalid-request", f"{unknown[0]}: {message}", item=item, errors=errors)


def _errors(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's list. A prompt that is neither a text nor a conversation has one error in place of one for each."""
    found: list[dict[str, Any]] = []
    for reported in error.errors(include_url=False, include_context=True, include_input=False):
        location, message, kind = reported["loc"], reported["msg"].removeprefix("Value error, "), reported["type"]
        if len(location) > 3 and location[0] == "items" and location[2] == "prompt":
            # The fourth place says which of the two was tried.
            if len(location) == 4 and kind in ("string_type", "list_type"):
                message = NEITHER
            location = (*location[:3], *location[4:])
        found.append({"loc": location, "msg": message, "type": kind, "ctx": reported.get("ctx", {})})
    nearer = {each["loc"][:3] for each in found if each["msg"] != NEITHER}
    whole: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in found:
        if each["msg"] != NEITHER or each["loc"] not in nearer:
            whole.setdefault((each["loc"], each["msg"]), each)
    return list(whole.values())


def _invalid(error: ValidationError, body: bytes, limits: ServiceLimits) -> ProblemError:
    errors = _errors(error)
    first = errors[0]
    if first["type"] == "json_invalid":
        # JSON may escape half of a surrogate pair, which is no text. Python's own parser lets it through, so that
        # validation can say which item holds it.
        try:
            wire.RewardRequest.model_validate(json.loads(body))
        except ValidationError as second:
            errors = _errors(second)
            first = errors[0]
        except (ValueError, RecursionError):
            return ProblemError("malformed-body", first["msg"])
    location = first["loc"]
    if location == ("items",) and first["type"] == "too_short":
        return ProblemError("empty-items", "`items` is empty; give at least one prompt and response")
    if location == ("items",) and first["type"] == "too_long":
        return too_many(first["ctx"]["actual_length"], limits)
    item = location[1] if len(location) > 1 and location[0] == "items" and isinstance(location[1], int) else None
    # Of a prompt as a whole, only its length is checked by a function of ours.
    too_long = first["type"] == "string_too_long" or (first["type"], location[2:]) == ("value_error", ("prompt",))
    name = "text-too-long" if too_long else "invalid-request"
    return ProblemError(
        name,
        f"{_path(location)}: {first['msg']}",
        item=item,
        errors=[{"path": _path(each["loc"]), "message": each["msg"]} for each in errors[:MAX_REPORTED_ERRORS]],
    )


def _path(location: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")[:MAX_PATH_CHARS] or "body"


def _content_type(request: Request) -> str:
    sent = request.headers.get("content-type", JSON_TYPE)
    content_type = sent.split(";")[0].strip().lower()
    if content_type != JSON_TYPE and content_type not in MSGPACK_TYPES:
        raise ProblemError("unsupported-media-type", f"the body is {sent}; send {JSON_TYPE} or {MSGPACK_TYPES[0]}")
    return content_type


def _wants_msgpack(request: Request, content_type: str) -> bool:
    """What `Accept` asks for; without a preference, what was sent."""
    accept = request.headers.get("accept", "*/*")
    if any(name in accept for name in MSGPACK_TYPES):
        return True
    return content_type in MSGPACK_TYPES and JSON_TYPE not in accept


async def _problem_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    request.app.state.service.refused(request, error)
    return problem_response(error)


async def _client_gone_response(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is for the metrics


async def _http_exception_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    name = "method-not-allowed" if error.status_code == 405 else "not-found"
    problem = ProblemError(name, f"{request.method} {request.url.path} is not served here; see /docs")
    request.app.state.service.refused(request, problem)
    response = problem_response(problem)
    response.headers.update(error.headers or {})  # a 405 says what is allowed
    return response


async def _internal_error_response(request: Request, error: Exception) -> Response:
    return problem_response(INTERNAL_ERROR)
