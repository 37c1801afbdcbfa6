"""The ASGI application: routes, middleware and exception handlers.

Handlers parse, submit and wait. The model runs in other threads, so no handler blocks the event loop.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from plaudit import wire
from plaudit.reward_service import protocols as compat
from plaudit.reward_service.engine.batching import Engine, Scorer
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.engine.metrics import Metrics
from plaudit.reward_service.http import openapi, tracing
from plaudit.reward_service.http.middleware import (
    INTERNAL_ERROR,
    PUBLIC_PATHS,
    RELOAD_PATH,
    AccessMiddleware,
    problem_response,
)
from plaudit.reward_service.http.rewards import (
    MSGPACK_TYPES,
    FastRouteMiddleware,
    answer_rewards,
    model_response,
)
from plaudit.reward_service.http.service import ClientGoneError, Service, ServiceLimits
from plaudit.reward_service.keys import Keys
from plaudit.reward_service.problems import ProblemError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

METRICS_PATH = "/metrics"
DESCRIPTION = """Rewards from a sequence classifier: raw logits, chosen by label, in request order.

Errors on `/v1` are `application/problem+json` documents; `type` names the problem. If the service has keys, every route
but the health routes needs `Authorization: Bearer KEY`. The other tags are the protocols of other servers, with their
own errors, over the same engine.
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
    """The ASGI application over a started engine. Without `api_keys`, no request needs a key.

    `reload` loads the model again, in a thread, for `POST /v1/model:reload`. With `traces`, every request but health
    probes and `/metrics` gets a span. `app.state.service` is the `Service`.
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
    app.add_middleware(
        FastRouteMiddleware, path=wire.REWARDS_PATH, handler=partial(answer_rewards, service), refusals=refusals
    )
    app.state.keys = api_keys if isinstance(api_keys, Keys) else Keys(api_keys)
    app.add_middleware(AccessMiddleware, keys=app.state.keys, engine=engine)
    if traces is not None:
        app.add_middleware(tracing.TracingMiddleware, provider=traces, quiet=PUBLIC_PATHS | {METRICS_PATH})
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
        s4XX="The request is refused: `type` names the problem, `item` the item at fault.",
        s5XX="The request was not scored. Retry 503 and 504.",
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
        return model_response(service, request)

    @app.post(RELOAD_PATH, response_model=wire.ModelInfo, responses=problems, summary="Read the model's files again")
    async def reload(request: Request) -> Response:
        await service.reload_model()
        return model_response(service, request)

    @app.get(wire.LIVEZ_PATH, summary="Liveness probe")
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        wire.READYZ_PATH,
        responses=openapi.refusals(s503="Draining, or a thread has died; `detail` says which."),
        summary="Readiness probe",
    )
    async def readyz() -> dict[str, str]:
        reason = engine.unready()
        if reason is not None:
            raise ProblemError("not-ready", reason)
        return {"status": "ok"}

    @app.get(METRICS_PATH, response_class=PlainTextResponse, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.exposition(), headers={"content-type": Metrics.content_type})


async def _problem_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    request.app.state.service.record_refusal(request, error)
    return problem_response(error)


async def _client_gone_response(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the status is for the metrics


async def _http_exception_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    name = "method-not-allowed" if error.status_code == 405 else "not-found"
    problem = ProblemError(name, f"{request.method} {request.url.path} is not served here; see /docs")
    request.app.state.service.record_refusal(request, problem)
    response = problem_response(problem)
    response.headers.update(error.headers or {})  # a 405 says what is allowed
    return response


async def _internal_error_response(request: Request, error: Exception) -> Response:
    return problem_response(INTERNAL_ERROR)
