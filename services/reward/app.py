"""The HTTP face of the engine. Checks what comes in, says precisely what is wrong with it, and never invents a score.

Handlers only parse, submit and wait; nothing here runs long enough to hold up the event loop.
"""

import asyncio
import dataclasses
import hashlib
import hmac
import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import wire
from services.reward import compat
from services.reward.batching import Engine, Scored, Scorer, Text
from services.reward.cache import CachedScore, ScoreCache
from services.reward.metrics import Metrics
from services.reward.model_files import ModelError
from services.reward.problems import ProblemError

PUBLIC_PATHS = frozenset({wire.LIVEZ_PATH, wire.READYZ_PATH}) | compat.HEALTH_PATHS
"""What answers without a key: health, and nothing else."""
MAX_REPORTED_ERRORS = 10
JSON_TYPE = "application/json"
MSGPACK_TYPES = ("application/msgpack", "application/vnd.msgpack", "application/x-msgpack")
TIMEOUT_HEADER = "x-request-timeout"
RELOAD_PATH = "/v1/model:reload"


@dataclass(frozen=True)
class ServiceLimits:
    """What one request may hold. Each is also told by `GET /v1/model`."""

    max_items: int = wire.MAX_ITEMS_PER_REQUEST
    max_text_chars: int = wire.MAX_TEXT_CHARS
    max_body_bytes: int = 16 * 1024 * 1024


@dataclass(frozen=True)
class Service:
    """What handlers share; foreign protocols are built on it too."""

    engine: Engine
    limits: ServiceLimits
    default_label: str | None
    join: wire.Join
    cache: ScoreCache | None = None
    reload: Callable[[], Scorer] | None = None
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def text(self, prompt: str, response: str) -> Text:
        """Prompt and response as the model wants them."""
        return (prompt, response) if self.join == "pair" else (prompt + response, None)

    async def read_body(self, request: Request) -> bytes:
        """The body, refused as soon as it is known to be too large."""
        limit = self.limits.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise ProblemError("body-too-large", f"the body has {declared} bytes; at most {limit} are taken")
        chunks: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise ProblemError("body-too-large", f"the body has more than the {limit} bytes that are taken")
            chunks.append(chunk)
        return b"".join(chunks)

    async def score(self, texts: Sequence[Text], request: Request) -> Scored:
        """The logits of `texts`, or `ProblemError`. Gives up when the client does or its deadline passes."""
        if self.cache is None:
            return await self._run(texts, request)
        known = self.cache.lookup(self.engine.scorer, texts)
        missing = [text for text, score in zip(texts, known, strict=True) if score is None]
        self.engine.metrics.cached_items.inc(len(texts) - len(missing))
        if not missing:
            self.engine.require_open()
            return _merged(known, Scored([], [], [], self.engine.scorer, 0.0, 0.0, 0.0))
        scored = await self._run(missing, request)
        self.cache.keep(missing, scored)
        return _merged(known, scored)

    async def _run(self, texts: Sequence[Text], request: Request) -> Scored:
        timeout_s = _timeout(request)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        job = self.engine.submit(texts, deadline=deadline)
        gone = asyncio.ensure_future(request.receive())
        either: set[asyncio.Future[Any]] = {job.future, gone}
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if job.future.done():
                return job.future.result()
            if gone.done():
                raise ClientGoneError
            raise ProblemError("deadline-exceeded", f"no score within the {timeout_s:g} s that {TIMEOUT_HEADER} leaves")
        finally:
            gone.cancel()
            self.engine.abandon(job)

    def check(self, texts: Sequence[Text]) -> None:
        """Hold texts that came by a foreign protocol to the same limits."""
        if not texts:
            raise ProblemError("empty-items", "the request holds no text")
        if len(texts) > self.limits.max_items:
            raise _too_many(len(texts), self.limits)
        for index, (first, second) in enumerate(texts):
            if max(len(first), len(second or "")) > self.limits.max_text_chars:
                raise _too_long(index, self.limits)
            try:
                f"{first}{second or ''}".encode()
            except UnicodeEncodeError:
                raise ProblemError("invalid-request", f"text {index} holds half a surrogate pair", item=index) from None

    async def load_again(self) -> Scorer:
        """Read the model anew and switch to it. `ProblemError` leaves the old one in place."""
        if self.reload is None:
            raise ProblemError("not-found", "this service was started without a way to reload")
        async with self.reloading:
            try:
                scorer = await asyncio.to_thread(self.reload)
                self.engine.replace(scorer)
            except (ModelError, ValueError) as error:
                raise ProblemError("reload-failed", f"the old model still serves: {error}") from error
            return scorer

    def info(self) -> wire.ModelInfo:
        scorer = self.engine.scorer
        return wire.ModelInfo(
            id=scorer.id,
            revision=scorer.revision,
            labels=list(scorer.labels),
            default_label=self.default_label or (scorer.labels[0] if len(scorer.labels) == 1 else None),
            join=self.join,
            dtype=scorer.dtype,
            limits=wire.Limits(
                max_items=self.limits.max_items,
                max_text_chars=self.limits.max_text_chars,
                max_body_bytes=self.limits.max_body_bytes,
                max_tokens=scorer.max_tokens,
            ),
        )

    def label_index(self, scorer: Scorer, label: str | None) -> int:
        """Which logit is the reward. Only a model of one logit needs no name for it."""
        wanted = label if label is not None else self.default_label
        if wanted is None:
            if len(scorer.labels) == 1:
                return 0
            raise ProblemError(
                "label-required",
                f"the model has {len(scorer.labels)} labels and the service no default; name one of them in `label`",
                labels=list(scorer.labels),
            )
        if wanted not in scorer.labels:
            raise ProblemError(
                "unknown-label",
                f"the model has no label {wanted!r}; it has {', '.join(scorer.labels)}",
                labels=list(scorer.labels),
            )
        return scorer.labels.index(wanted)


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


def create_app(
    engine: Engine,
    *,
    limits: ServiceLimits | None = None,
    default_label: str | None = None,
    join: wire.Join = "concat",
    api_keys: Sequence[str] = (),
    cache: ScoreCache | None = None,
    reload: Callable[[], Scorer] | None = None,
) -> FastAPI:
    """The ASGI application over a started engine. Without `api_keys` every caller is served.

    `reload` loads the model anew, in a thread, for `POST /v1/model:reload`. `app.state.service` is the `Service`.
    """
    service = Service(engine, limits or ServiceLimits(), default_label, join, cache, reload)
    app = FastAPI(
        title="Plaudit reward service",
        description="Rewards from a sequence classifier: raw logits, chosen by label, in request order.",
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, keys=api_keys, metrics=engine.metrics)
    app.add_exception_handler(ProblemError, _problem_response)
    app.add_exception_handler(ClientGoneError, _client_gone_response)
    app.add_exception_handler(HTTPException, _http_exception_response)
    app.add_exception_handler(Exception, _internal_error_response)
    _add_routes(app, service)
    for router in compat.routers(service):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": wire.Problem, "content": {wire.PROBLEM_CONTENT_TYPE: {}}, "description": names}
        for status, names in {
            "4XX": "The request is refused; `type` says why and `item` where.",
            "5XX": "No score this time; 503 and 504 are worth another try.",
        }.items()
    }

    @app.post(
        wire.REWARDS_PATH,
        response_model=wire.RewardResponse,
        responses=problems,
        summary="Rewards for prompts and responses",
        openapi_extra=_body_schema(wire.RewardRequest),
    )
    async def rewards(request: Request) -> Response:
        content_type = _content_type(request)
        body = await service.read_body(request)
        wanted = parse_rewards_request(body, service.limits, packed=content_type in MSGPACK_TYPES)
        index = service.label_index(engine.scorer, wanted.label)
        scored = await service.score([service.text(item.prompt, item.response) for item in wanted.items], request)
        answer = wire.RewardResponse(
            rewards=[row[index] for row in scored.logits],
            model=scored.scorer.id,
            revision=scored.scorer.revision,
            label=scored.scorer.labels[index],
            truncated=scored.truncated,
        )
        headers = {"server-timing": server_timing(scored)}
        if _wants_msgpack(request, content_type):
            # Logits are float32 to begin with, so half the bytes lose nothing.
            packed = msgpack.packb(answer.model_dump(), use_single_float=True)
            return Response(packed, media_type=MSGPACK_TYPES[0], headers=headers)
        return Response(answer.__pydantic_serializer__.to_json(answer), media_type=JSON_TYPE, headers=headers)

    @app.get(wire.MODEL_PATH, response_model=wire.ModelInfo, summary="What is served, and its limits")
    async def model() -> wire.ModelInfo:
        return service.info()

    @app.post(RELOAD_PATH, response_model=wire.ModelInfo, responses=problems, summary="Read the model's files again")
    async def reload() -> wire.ModelInfo:
        await service.load_again()
        return service.info()

    @app.get(wire.LIVEZ_PATH, summary="The process answers")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(wire.READYZ_PATH, responses={503: {"model": wire.Problem}}, summary="Worth sending work to")
    async def readyz() -> dict[str, str]:
        reason = engine.unready()
        if reason is not None:
            raise ProblemError("not-ready", reason)
        return {"status": "ok"}

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), headers={"content-type": Metrics.content_type})


def parse_rewards_request(body: bytes, limits: ServiceLimits, *, packed: bool = False) -> wire.RewardRequest:
    """The request in `body`, JSON or msgpack (`packed`), or a `ProblemError` that names the first item at fault."""
    try:
        if packed:
            request = wire.RewardRequest.model_validate(msgpack.unpackb(body))
        else:
            request = wire.RewardRequest.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error, body, limits) from None
    except (ValueError, msgpack.UnpackException) as error:
        raise ProblemError("malformed-body", f"the body is not msgpack: {error}") from None
    if len(request.items) > limits.max_items:
        raise _too_many(len(request.items), limits)
    if limits.max_text_chars < wire.MAX_TEXT_CHARS:
        for index, item in enumerate(request.items):
            if max(len(item.prompt), len(item.response)) > limits.max_text_chars:
                raise _too_long(index, limits)
    return request


def _too_many(count: int, limits: ServiceLimits) -> ProblemError:
    return ProblemError("too-many-items", f"the request holds {count} items; at most {limits.max_items} are taken")


def _too_long(index: int, limits: ServiceLimits) -> ProblemError:
    return ProblemError(
        "text-too-long", f"items[{index}] has a text of more than {limits.max_text_chars} characters", item=index
    )


def _merged(known: Sequence[CachedScore | None], scored: Scored) -> Scored:
    """`scored` with the cached scores put back where they belong."""
    truncated = set(scored.truncated)
    fresh = (
        CachedScore(row, index in truncated, length)
        for index, (row, length) in enumerate(zip(scored.logits, scored.lengths, strict=True))
    )
    scores = [score or next(fresh) for score in known]
    return dataclasses.replace(
        scored,
        logits=[score.logits for score in scores],
        truncated=[index for index, score in enumerate(scores) if score.truncated],
        lengths=[score.length for score in scores],
    )


def _timeout(request: Request) -> float | None:
    """Seconds until the client stops waiting, from its `X-Request-Timeout` header."""
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        timeout_s = float(value)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise ProblemError("invalid-request", f"{TIMEOUT_HEADER}: {value!r} is no positive number of seconds")
    return timeout_s


def _invalid(error: ValidationError, body: bytes, limits: ServiceLimits) -> ProblemError:
    errors = error.errors(include_url=False, include_context=True, include_input=False)
    first = errors[0]
    if first["type"] == "json_invalid":
        # JSON may escape half of a surrogate pair, which is no text. Python's own parser lets it through, so that
        # validation can say which item holds it.
        try:
            wire.RewardRequest.model_validate(json.loads(body))
        except ValidationError as second:
            errors = second.errors(include_url=False, include_context=True, include_input=False)
            first = errors[0]
        except (ValueError, RecursionError):
            return ProblemError("malformed-body", first["msg"])
    location = first["loc"]
    if location == ("items",) and first["type"] == "too_short":
        return ProblemError("empty-items", "`items` is empty; give at least one prompt and response")
    if location == ("items",) and first["type"] == "too_long":
        return _too_many(first["ctx"]["actual_length"], limits)
    item = location[1] if len(location) > 1 and location[0] == "items" and isinstance(location[1], int) else None
    name = "text-too-long" if first["type"] == "string_too_long" else "invalid-request"
    return ProblemError(
        name,
        f"{_path(location)}: {first['msg']}",
        item=item,
        errors=[{"path": _path(each["loc"]), "message": each["msg"]} for each in errors[:MAX_REPORTED_ERRORS]],
    )


def _path(location: tuple[int | str, ...]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".") or "body"


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


def server_timing(scored: Scored) -> str:
    """Where the time went, as a `Server-Timing` header, in milliseconds."""
    phases = (("tokenize", scored.tokenize_s), ("queue", scored.queue_s), ("inference", scored.inference_s))
    return ", ".join(f"{name};dur={seconds * 1000:.2f}" for name, seconds in phases)


class Gate:
    """Keys, request ids and counts, before any route. Plain ASGI: BaseHTTPMiddleware would halve the throughput."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")[:128] or uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", request_id))
                route = scope.get("route")
                path = route.path if route is not None else "unknown"
                self._metrics.responses.labels(path, message["status"]).inc()
            await send(message)

        if (
            self._keys
            and scope["path"] not in PUBLIC_PATHS
            and not self._authorised(headers.get(b"authorization", b""))
        ):
            problem = ProblemError("unauthorized", "send a valid key as `Authorization: Bearer KEY`")
            self._metrics.refused_requests.labels(problem.name).inc()
            await problem_response(problem)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _authorised(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        presented = hashlib.sha256(key.strip()).digest()
        # Every key is compared, so that the time taken says nothing about which one came close.
        matches = [hmac.compare_digest(presented, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def problem_response(problem: ProblemError) -> Response:
    """`problem` as `application/problem+json`."""
    return Response(
        problem.document().model_dump_json(exclude_none=True),
        status_code=problem.status,
        headers=problem.headers(),
        media_type=wire.PROBLEM_CONTENT_TYPE,
    )


async def _problem_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    request.app.state.service.engine.metrics.refused_requests.labels(error.name).inc()
    return problem_response(error)


async def _client_gone_response(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the number is for the metrics


async def _http_exception_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    name = "method-not-allowed" if error.status_code == 405 else "not-found"
    return problem_response(ProblemError(name, f"{request.method} {request.url.path} is not served here; see /docs"))


async def _internal_error_response(request: Request, error: Exception) -> Response:
    return problem_response(ProblemError("internal-error", "the service failed; its log says where"))


def _body_schema(*models: type[Any]) -> dict[str, Any]:
    refs = [{"$ref": f"#/components/schemas/{model.__name__}"} for model in models]
    return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": refs[0]}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
        _, definitions = models_json_schema(
            [(wire.RewardRequest, "validation")], ref_template="#/components/schemas/{model}"
        )
        schema["components"]["schemas"] |= definitions["$defs"]
        app.openapi_schema = schema
    return app.openapi_schema
