"""Spans as a real collector gets them, from the real application and from the program itself."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from harness.machine.collector import Collector, attributes, collector
from harness.reward_service import RewardService
from harness.scorers import FakeScorer
from plaudit import wire
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http.tracing import TracingError, phases, provider_from_environment

ITEM = {"prompt": "ab", "response": "cde"}
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
UNASKED = TRACEPARENT.removesuffix("01") + "00"


@pytest.fixture
def spans_of(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Span]]:
    """Serve what `ask` sends and give back the spans that reached the collector by the time all were sent."""

    def run(ask: Callable[[httpx.AsyncClient], Any], scorer: FakeScorer | None = None, **options: Any) -> list[Span]:
        with collector() as received:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
            provider = provider_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": received.url})
            assert provider is not None

            async def serve() -> None:
                async with client_of(make_engine(scorer), traces=provider, default_label="LENGTH", **options) as http:
                    await ask(http)

            asyncio.run(serve())
            provider.shutdown()
            return received.spans

    return run


def server_span(spans: list[Span]) -> Span:
    [span] = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
    return span


def test_a_request_is_a_child_of_its_caller_and_its_phases_follow_each_other(
    spans_of: Callable[..., list[Span]],
) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
        await http.post(wire.REWARDS_PATH, json={"items": [ITEM, ITEM]}, headers=headers)

    spans = spans_of(ask)
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    root = server_span(spans)
    assert (root.name, root.parent_span_id.hex()) == ("POST /v1/rewards", CALLER)
    said = attributes(root.attributes)
    assert said["http.request.method"] == "POST"
    assert (said["http.route"], said["url.path"]) == (wire.REWARDS_PATH, wire.REWARDS_PATH)
    assert (said["http.response.status_code"], said["plaudit.request_id"]) == (200, "mine")
    assert (said["plaudit.items"], said["plaudit.tokens"], said["plaudit.revision"]) == (2, 10, "sha256:fake")
    assert root.status.code == Status.STATUS_CODE_UNSET
    below = sorted((span for span in spans if span is not root), key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in below] == ["tokenize", "queue", "inference"]
    assert {span.parent_span_id for span in below} == {root.span_id}
    edges = [root.start_time_unix_nano]
    for span in below:
        edges += [span.start_time_unix_nano, span.end_time_unix_nano]
    edges.append(root.end_time_unix_nano)
    assert edges == sorted(edges)
    assert edges[2] == edges[3], "the queue begins where tokenising ends"
    assert edges[4] == edges[5], "inference begins where the queue ends"


def test_without_a_caller_a_request_begins_a_trace_and_probes_begin_none(spans_of: Callable[..., list[Span]]) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        for path in (wire.LIVEZ_PATH, wire.READYZ_PATH, "/health", "/metrics", wire.MODEL_PATH):
            assert (await http.get(path)).status_code == 200

    [span] = spans_of(ask)
    assert (span.name, span.parent_span_id) == ("GET /v1/model", b"")


def test_what_the_caller_does_not_sample_is_not_sent(spans_of: Callable[..., list[Span]]) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        await http.post(wire.REWARDS_PATH, json={"items": [ITEM]}, headers={"traceparent": UNASKED})

    assert spans_of(ask) == []


def test_a_failed_batch_is_an_error_with_its_reason(spans_of: Callable[..., list[Span]]) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        await http.post(wire.REWARDS_PATH, json={"items": [{"prompt": "poison", "response": ""}]})

    spans = spans_of(ask)
    root = server_span(spans)
    said = attributes(root.attributes)
    assert (said["http.response.status_code"], said["error.type"]) == (500, "scoring-failed")
    assert root.status.code == Status.STATUS_CODE_ERROR
    assert "poisoned batch" in root.status.message
    assert sorted(span.name for span in spans if span is not root) == ["inference", "queue", "tokenize"]


@pytest.mark.parametrize(
    ("path", "body", "status", "problem"),
    [
        (wire.REWARDS_PATH, {"items": []}, 422, "empty-items"),
        ("/predict", {"inputs": "poison"}, 500, "scoring-failed"),
        ("/nowhere", {}, 404, "not-found"),
    ],
)
def test_a_refusal_is_named_and_only_the_service_s_own_are_errors(
    spans_of: Callable[..., list[Span]], path: str, body: Any, status: int, problem: str | None
) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        assert (await http.post(path, json=body)).status_code == status

    root = server_span(spans_of(ask))
    said = attributes(root.attributes)
    assert (said["http.response.status_code"], said.get("plaudit.problem")) == (status, problem)
    assert (root.status.code == Status.STATUS_CODE_ERROR) == (status >= 500)


def test_a_wrong_key_is_in_the_trace(spans_of: Callable[..., list[Span]]) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        await http.get(wire.MODEL_PATH)

    said = attributes(server_span(spans_of(ask, api_keys=["key"])).attributes)
    assert (said["http.response.status_code"], said["plaudit.problem"]) == (401, "unauthorized")


def test_a_defect_is_recorded_with_its_exception(
    spans_of: Callable[..., list[Span]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(http: httpx.AsyncClient) -> None:
        monkeypatch.setattr(Engine, "unready", lambda engine: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await http.get("/v2/models/reward/ready")

    root = server_span(spans_of(ask))
    assert (root.status.code, attributes(root.attributes)["http.response.status_code"]) == (2, 500)
    [event] = root.events
    assert attributes(event.attributes)["exception.type"] == "ZeroDivisionError"


def test_the_phases_of_a_job_that_never_reaches_the_model() -> None:
    async def run() -> None:
        job = Engine(FakeScorer(), batch_tokens=1, max_queue_tokens=1).submit([("text", None)])
        begin = job.admitted_at
        assert phases(job, begin + 2) == [("tokenize", begin, begin + 2)]
        job.tokenized_at = begin + 1
        assert phases(job, begin + 2) == [("tokenize", begin, begin + 1), ("queue", begin + 1, begin + 2)]

    asyncio.run(run())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://x:4318/v1/metrics"},
    ],
)
def test_nobody_is_traced_who_did_not_ask(environment: dict[str, str]) -> None:
    assert provider_from_environment(environment) is None


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER is zipkin"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "set it to http/protobuf"),
    ],
)
def test_what_cannot_be_sent_is_said_at_the_start(environment: dict[str, str], said: str) -> None:
    with pytest.raises(TracingError, match=said):
        provider_from_environment(environment)


def test_a_propagator_that_is_not_there_is_said_at_the_start() -> None:
    script = (
        "import os\n"
        "from plaudit.reward_service.http.tracing import TracingError, provider_from_environment\n"
        "try:\n"
        "    provider_from_environment(os.environ)\n"
        "except TracingError as error:\n"
        "    print(error)\n"
    )
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318", "OTEL_PROPAGATORS": "b3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OTEL_PROPAGATORS is b3: Propagator b3 not found")


def test_a_missing_sdk_is_said_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracingError, match=r"opentelemetry\.sdk\.trace is not installed; install plaudit\[otel\]"):
        provider_from_environment({"OTEL_TRACES_EXPORTER": "otlp"})


def test_the_application_does_not_load_the_sdk() -> None:
    code = "import sys, plaudit.reward_service.app_factory\n"
    code += "print([n for n in sys.modules if n.startswith('opentelemetry.sdk')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def to_collector(monkeypatch: pytest.MonkeyPatch) -> Any:
    with collector() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "tenant=films")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "judge")
        yield received


def test_the_program_sends_its_last_spans_before_it_ends(classifier_dir: Path, to_collector: Collector) -> None:
    service = RewardService(classifier_dir, "--label", "POSITIVE")
    httpx.post(f"{service.url}/v1/rewards", json={"items": [ITEM]}).raise_for_status()
    assert service.kill(signal.SIGTERM) == 0
    assert [span.name for span in to_collector.spans][-1] == "POST /v1/rewards"
    assert len(to_collector.spans) == 4
    assert to_collector.services == {"judge"}
    assert to_collector.headers[0]["tenant"] == "films"


def test_a_collector_that_does_not_answer_holds_up_neither_requests_nor_the_end(
    classifier_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        service = RewardService(classifier_dir, "--label", "POSITIVE", "--grace-s", "600")
        answer = httpx.post(f"{service.url}/v1/rewards", json={"items": [ITEM]})
        assert len(json.loads(answer.content)["rewards"]) == 1
        assert service.kill(signal.SIGTERM) == 0
