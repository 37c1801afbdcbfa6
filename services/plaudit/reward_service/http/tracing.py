"""OpenTelemetry traces: a span for each request, with child spans for its phases.

A separate thread sends the spans from a bounded queue. The SDK is imported only if the environment names a collector.

Failure modes: a request that fails, or waits, because of its trace.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plaudit.reward_service.engine.batching import Job
from plaudit.reward_service.problems import ProblemError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

NOTES = "plaudit.notes"
"""In a traced request's scope: its `Notes`."""
FLUSH_S = 2.0
"""How long the shutdown waits for the last spans to be sent."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
INSTALL = "install plaudit[otel]"


class TracingError(Exception):
    """Traces can't be sent as the environment says. The message is one line and says what to do."""


@dataclass
class Notes:
    """What the handlers of one request add to its span."""

    jobs: list[tuple[Job, float]] = field(default_factory=list)
    """Each job, and when its handler stopped waiting for it (`time.monotonic()`)."""
    problem: ProblemError | None = None


def note_job(scope: Scope, job: Job) -> None:
    """Add this job's phases to the request's span. Call it when the wait for the job is over."""
    notes = scope.get(NOTES)
    if notes is not None:
        notes.jobs.append((job, time.monotonic()))


def note_problem(scope: Scope, problem: ProblemError) -> None:
    """Add the reason of a refusal to the request's span."""
    notes = scope.get(NOTES)
    if notes is not None:
        notes.problem = problem


def phases(job: Job, done_at: float) -> list[tuple[str, float, float]]:
    """Name, begin and end (`time.monotonic()`) of each phase that the job has entered."""
    if not job.tokenized_at:
        return [("tokenize", job.admitted_at, done_at)]
    tokenize = ("tokenize", job.admitted_at, job.tokenized_at)
    if job.first_batch_at is None:
        return [tokenize, ("queue", job.tokenized_at, done_at)]
    future = job.future
    if not future.cancelled() and future.exception() is None:
        # Inference ended a moment before the handler woke up.
        done_at = job.first_batch_at + future.result().inference_s
    return [tokenize, ("queue", job.tokenized_at, job.first_batch_at), ("inference", job.first_batch_at, done_at)]


def provider_from_environment(environment: Mapping[str, str]) -> "TracerProvider | None":
    """A provider that sends spans as the OTEL_* variables say; None if they ask for none. Raises `TracingError`."""

    def asked(*names: str) -> str:
        return next((environment[name].strip() for name in names if environment.get(name, "").strip()), "")

    endpoint = asked("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = asked("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if exporter == "none" or asked("OTEL_SDK_DISABLED").lower() == "true":
        return None
    if exporter != "otlp":
        raise TracingError(f"OTEL_TRACES_EXPORTER is {exporter}; set it to otlp or none")
    protocol = asked("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol != "http/protobuf":
        raise TracingError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; set it to http/protobuf (most collectors' port 4318)"
        )
    try:
        # Importing it loads the propagators that OTEL_PROPAGATORS names, before the first request.
        from opentelemetry import propagate  # noqa: F401
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            f"traces are on and {error.name} is not installed; {INSTALL}, or set OTEL_TRACES_EXPORTER=none"
        ) from None
    except ValueError as error:
        raise TracingError(f"OTEL_PROPAGATORS is {asked('OTEL_PROPAGATORS')}: {error}") from None
    is_named = asked("OTEL_SERVICE_NAME") or f"{SERVICE_NAME}=" in asked("OTEL_RESOURCE_ATTRIBUTES")
    named = {} if is_named else {SERVICE_NAME: "plaudit-reward"}
    # Not the global provider: FastAPI would then send its own spans for the same requests.
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def finish(provider: "TracerProvider") -> None:
    """Send the remaining spans, for at most `FLUSH_S`."""
    thread = threading.Thread(target=provider.shutdown, daemon=True)
    thread.start()
    thread.join(FLUSH_S)


class TracingMiddleware:
    """The outermost middleware: makes the span, as a child of the caller's span if it sends `traceparent`.

    Requests to the paths in `quiet` get no span: probes would outnumber everything else.
    """

    def __init__(self, app: ASGIApp, provider: "TracerProvider", quiet: frozenset[str]) -> None:
        self._app = app
        self._tracer = provider.get_tracer("plaudit.reward")
        self._quiet = quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on inside a span."""
        if scope["type"] != "http" or scope["path"] in self._quiet:
            await self._app(scope, receive, send)
            return
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        span = self._tracer.start_span(
            method, propagate.extract(headers), SpanKind.SERVER, attributes=_asked(scope, headers, method)
        )
        to_epoch_ns = time.time_ns() - time.monotonic_ns()
        notes = scope[NOTES] = Notes()
        answer: dict[str, Any] = {}

        async def send_and_see(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.update(message)
            await send(message)

        try:
            await self._app(scope, receive, send_and_see)
        except Exception as error:
            span.record_exception(error)
            # The outermost exception handler, outside this middleware, answers 500.
            answer.setdefault("status", 500)
            raise
        finally:
            if span.is_recording():
                self._describe(span, scope, notes, answer, to_epoch_ns)
            span.end()

    def _describe(self, span: "Span", scope: Scope, notes: Notes, answer: dict[str, Any], to_epoch_ns: int) -> None:
        from opentelemetry.trace import StatusCode, set_span_in_context

        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.set_attribute("http.route", route)
            span.update_name(f"{scope['method']} {route}")
        for name, value in answer.get("headers", ()):
            if name == b"x-request-id":
                span.set_attribute("plaudit.request_id", value.decode("latin-1"))
        status, problem = answer.get("status"), notes.problem
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if problem is not None:
            span.set_attribute("plaudit.problem", problem.name)
        if status is None or status >= 500:
            span.set_attribute("error.type", problem.name if problem is not None else str(status or "client-gone"))
            span.set_status(StatusCode.ERROR, problem.detail if problem is not None else None)
        context = set_span_in_context(span)
        for job, done_at in notes.jobs:
            span.set_attribute("plaudit.items", job.count)
            span.set_attribute("plaudit.tokens", job.tokens)
            span.set_attribute("plaudit.revision", job.scorer.revision)
            for name, begin, end in phases(job, done_at):
                child = self._tracer.start_span(name, context, start_time=int(begin * 1e9) + to_epoch_ns)
                child.end(int(end * 1e9) + to_epoch_ns)


def _asked(scope: Scope, headers: Mapping[str, str], method: str) -> dict[str, Any]:
    """A request's attributes by OpenTelemetry's conventions for HTTP servers."""
    attributes = {
        "http.request.method": method,
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
    }
    if method == "_OTHER":
        attributes["http.request.method_original"] = scope["method"]
    if "user-agent" in headers:
        attributes["user_agent.original"] = headers["user-agent"]
    if scope.get("client"):
        attributes["client.address"] = scope["client"][0]
    return attributes
