"""What the service answers, and how it refuses."""

import asyncio
import gc
import json
import re
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import msgpack
import pytest
from fastapi import Request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.scorers import FakeScorer
from plaudit import wire
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.engine.model_files import ModelError
from plaudit.reward_service.http import garbage_collection
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.service import ClientGoneError, ServiceLimits
from plaudit.reward_service.problems import ProblemError

ITEM = {"prompt": "ab", "response": "cde"}


@pytest.fixture
def ask(make_engine: Callable[..., Engine], client_of: Callable[..., Any]) -> Callable[..., httpx.Response]:
    """POST to a fresh service over a fake scorer and give back its answer."""

    def send(
        body: Any = None,
        *,
        content: bytes | None = None,
        scorer: FakeScorer | None = None,
        headers: dict[str, str] | None = None,
        path: str = wire.REWARDS_PATH,
        method: str = "POST",
        **options: Any,
    ) -> httpx.Response:
        async def run() -> httpx.Response:
            async with client_of(make_engine(scorer), **options) as http:
                data = content if content is not None else json.dumps(body).encode()
                return await http.request(
                    method, path, content=data, headers={"content-type": "application/json", **(headers or {})}
                )

        return asyncio.run(run())

    return send


def problem_of(response: httpx.Response) -> wire.Problem:
    assert response.headers["content-type"] == wire.PROBLEM_CONTENT_TYPE
    problem = wire.Problem.model_validate_json(response.content)
    assert problem.status == response.status_code
    return problem


def test_a_reward_is_the_raw_logit_of_the_named_label(ask: Callable[..., httpx.Response]) -> None:
    items = [ITEM, {"prompt": "", "response": "x"}]
    answer = wire.RewardResponse.model_validate_json(ask({"items": items, "label": "MINUS"}).content)
    assert answer.rewards == [-5, -1]
    assert (answer.label, answer.model, answer.revision) == ("MINUS", "fake", "sha256:fake")


def test_a_model_of_one_logit_needs_no_label(ask: Callable[..., httpx.Response]) -> None:
    answer = ask({"items": [ITEM]}, scorer=FakeScorer(labels=["SCORE"])).json()
    assert (answer["rewards"], answer["label"]) == ([5], "SCORE")


def test_a_default_label_stands_in_for_a_missing_one(ask: Callable[..., httpx.Response]) -> None:
    assert ask({"items": [ITEM]}, default_label="MINUS").json()["rewards"] == [-5]
    assert ask({"items": [ITEM], "label": "LENGTH"}, default_label="MINUS").json()["rewards"] == [5]


def test_an_unknown_label_is_refused_with_the_labels_there_are(ask: Callable[..., httpx.Response]) -> None:
    problem = problem_of(ask({"items": [ITEM], "label": "POSITIVE"}))
    assert problem.type == "urn:plaudit:problem:unknown-label"
    assert problem.labels == ["LENGTH", "MINUS"]
    assert "'POSITIVE'" in problem.detail


def test_a_missing_label_is_refused_with_the_labels_there_are(ask: Callable[..., httpx.Response]) -> None:
    problem = problem_of(ask({"items": [ITEM]}))
    assert (problem.type, problem.labels) == (wire.problem_type("label-required"), ["LENGTH", "MINUS"])


@pytest.mark.parametrize(
    ("body", "status", "name", "item", "said"),
    [
        ({"items": []}, 422, "empty-items", None, "empty"),
        ({}, 422, "invalid-request", None, "items: Field required"),
        ({"items": [ITEM, ITEM, {"prompt": "a"}]}, 422, "invalid-request", 2, "items[2].response: Field required"),
        ({"items": [ITEM, {"prompt": 3, "response": "a"}]}, 422, "invalid-request", 1, "items[1].prompt"),
        ({"items": [{**ITEM, "completion": "x"}]}, 422, "invalid-request", 0, "items[0].completion"),
        ({"items": [ITEM] * 4}, 422, "too-many-items", None, "4 items; at most 3"),
        ({"items": [ITEM] * 1025}, 422, "too-many-items", None, "1025 items; at most 3"),
        ({"items": [ITEM, {"prompt": "", "response": "x" * 21}]}, 422, "text-too-long", 1, "items[1]"),
        ({"items": [{"prompt": "", "response": ""}]}, 422, "no-tokens", 0, "items[0]"),
        ([1], 422, "invalid-request", None, "body"),
    ],
)
def test_a_refusal_names_the_item_and_why(
    ask: Callable[..., httpx.Response], body: Any, status: int, name: str, item: int | None, said: str
) -> None:
    problem = problem_of(ask(body, limits=ServiceLimits(max_items=3, max_text_chars=20), default_label="LENGTH"))
    assert (problem.status, problem.type, problem.item) == (status, wire.problem_type(name), item)
    assert said in problem.detail


def test_half_a_surrogate_pair_is_refused_by_its_item(ask: Callable[..., httpx.Response]) -> None:
    content = rb'{"items": [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "\ud800"}]}'
    problem = problem_of(ask(content=content))
    assert (problem.status, problem.item) == (422, 1)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"items": [NaN}', b"[" * 100_000])
def test_what_is_no_json_is_a_malformed_body(ask: Callable[..., httpx.Response], content: bytes) -> None:
    assert problem_of(ask(content=content)).type == wire.problem_type("malformed-body")


def test_another_content_type_is_refused(ask: Callable[..., httpx.Response]) -> None:
    problem = problem_of(ask({"items": [ITEM]}, headers={"content-type": "text/plain"}))
    assert (problem.status, problem.type) == (415, wire.problem_type("unsupported-media-type"))


def test_a_body_that_says_it_is_too_large_is_refused_unread(ask: Callable[..., httpx.Response]) -> None:
    problem = problem_of(ask(content=b"x" * 101, limits=ServiceLimits(max_body_bytes=100)))
    assert (problem.status, problem.type) == (413, wire.problem_type("body-too-large"))


def test_a_body_without_a_length_is_refused_when_it_grows_too_large(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    async def chunks() -> Any:
        for _ in range(10):
            yield b"x" * 50

    async def run() -> httpx.Response:
        async with client_of(make_engine(), limits=ServiceLimits(max_body_bytes=100)) as http:
            return await http.post(wire.REWARDS_PATH, content=chunks())

    assert problem_of(asyncio.run(run())).status == 413


def test_a_score_that_is_not_finite_is_an_error(ask: Callable[..., httpx.Response]) -> None:
    items = [ITEM, {"prompt": "nan", "response": ""}]
    problem = problem_of(ask({"items": items, "label": "LENGTH"}))
    assert (problem.status, problem.item, problem.type) == (500, 1, wire.problem_type("non-finite-score"))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer, max_queue_tokens=8)
        async with client_of(engine, default_label="LENGTH") as http:
            first = asyncio.create_task(http.post(wire.REWARDS_PATH, json={"items": [ITEM, ITEM]}))
            await asyncio.to_thread(scorer.entered.acquire)
            refused = await http.post(wire.REWARDS_PATH, json={"items": [ITEM]})
            assert problem_of(refused).type == wire.problem_type("queue-full")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            scorer.open()
            assert (await first).json()["rewards"] == [5, 5]

    asyncio.run(run())


def test_a_draining_service_is_alive_but_not_ready(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    async def run() -> None:
        engine = make_engine()
        async with client_of(engine, default_label="LENGTH") as http:
            assert (await http.get(wire.READYZ_PATH)).status_code == 200
            engine.draining = True
            assert (await http.get(wire.LIVEZ_PATH)).status_code == 200
            assert problem_of(await http.get(wire.READYZ_PATH)).status == 503
            refused = await http.post(wire.REWARDS_PATH, json={"items": [ITEM]})
            assert problem_of(refused).type == wire.problem_type("draining")
            assert refused.headers["retry-after"] == "1"

    asyncio.run(run())


def test_the_key_guards_everything_but_health(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    async def run() -> None:
        async with client_of(make_engine(), api_keys=["one", "two"]) as http:
            paths = [*create_app(make_engine()).openapi()["paths"], "/docs", "/openapi.json", "/nowhere"]
            health = {"/livez", "/readyz", "/health", "/ping", "/v2/health/live", "/v2/health/ready"}
            assert health < set(paths)
            for path in paths:
                assert (await http.get(path)).status_code == (200 if path in health else 401), path
            for key, status in [("one", 200), ("two", 200), ("three", 401), ("", 401)]:
                answer = await http.get(wire.MODEL_PATH, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == status
            refused = await http.get(wire.MODEL_PATH, headers={"authorization": "Basic one"})
            assert refused.headers["www-authenticate"] == "Bearer"

    asyncio.run(run())


def test_the_request_id_comes_back(ask: Callable[..., httpx.Response]) -> None:
    assert ask({"items": []}, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert len(ask({"items": []}).headers["x-request-id"]) == 32


def test_the_model_route_tells_labels_and_limits(ask: Callable[..., httpx.Response]) -> None:
    answer = ask(method="GET", path=wire.MODEL_PATH, join="pair", default_label="MINUS", limits=ServiceLimits(7, 8, 9))
    info = wire.ModelInfo.model_validate_json(answer.content)
    assert (info.labels, info.default_label, info.join) == (["LENGTH", "MINUS"], "MINUS", "pair")
    assert info.limits == wire.Limits(max_items=7, max_text_chars=8, max_body_bytes=9, max_tokens=512)


def test_unknown_routes_and_methods_are_problems_too(ask: Callable[..., httpx.Response]) -> None:
    assert problem_of(ask(path="/nowhere")).status == 404
    refused = ask(method="GET")
    assert (problem_of(refused).status, refused.headers["allow"]) == (405, "POST")


def test_the_metrics_count_what_happened(make_engine: Callable[..., Engine], client_of: Callable[..., Any]) -> None:
    async def run() -> str:
        async with client_of(make_engine(), default_label="LENGTH") as http:
            await http.post(wire.REWARDS_PATH, json={"items": [ITEM, ITEM]})
            await http.post(wire.REWARDS_PATH, json={"items": []})
            return (await http.get("/metrics")).text

    text = asyncio.run(run())
    assert "plaudit_reward_scored_items_total 2.0" in text
    assert 'plaudit_reward_responses_total{route="/v1/rewards",status="200"} 1.0' in text
    assert 'plaudit_reward_refused_requests_total{reason="empty-items"} 1.0' in text


def test_every_reference_in_the_openapi_document_resolves(ask: Callable[..., httpx.Response]) -> None:
    document = ask(method="GET", path="/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert "RewardRequest" in references


def test_msgpack_says_the_same_as_json(ask: Callable[..., httpx.Response]) -> None:
    content = msgpack.packb({"items": [ITEM], "label": "MINUS"})
    answer = ask(content=content, headers={"content-type": "application/msgpack"})
    assert answer.headers["content-type"] == "application/msgpack"
    assert wire.RewardResponse.model_validate(msgpack.unpackb(answer.content)).rewards == [-5]
    as_json = ask(content=content, headers={"content-type": "application/msgpack", "accept": "application/json"})
    assert as_json.json()["rewards"] == [-5]
    packed = ask({"items": [ITEM], "label": "MINUS"}, headers={"accept": "application/msgpack"})
    assert msgpack.unpackb(packed.content)["rewards"] == [-5]


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\xa1\xff", b"\x81\xa5items", b"\xdd\xff\xff\xff\xff"])
def test_what_is_no_msgpack_is_a_malformed_body(ask: Callable[..., httpx.Response], content: bytes) -> None:
    problem = problem_of(ask(content=content, headers={"content-type": "application/msgpack"}))
    assert problem.type == wire.problem_type("malformed-body")


@pytest.mark.parametrize("timeout", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_no_time_is_refused(ask: Callable[..., httpx.Response], timeout: str) -> None:
    assert problem_of(ask({"items": [ITEM], "label": "LENGTH"}, headers={"x-request-timeout": timeout})).status == 422


def test_a_passed_deadline_is_504_and_its_texts_never_reach_the_model(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        async with client_of(make_engine(scorer), default_label="LENGTH") as http:
            first = asyncio.create_task(http.post(wire.REWARDS_PATH, json={"items": [ITEM]}))
            await asyncio.to_thread(scorer.entered.acquire)
            late = await http.post(wire.REWARDS_PATH, json={"items": [ITEM] * 3}, headers={"x-request-timeout": "0.05"})
            assert problem_of(late).type == wire.problem_type("deadline-exceeded")
            scorer.open()
            await first
            await http.post(wire.REWARDS_PATH, json={"items": [{"prompt": "", "response": "last"}]})

    asyncio.run(run())
    assert scorer.batches == [[5], [4]]


def test_texts_of_a_client_that_has_gone_never_reach_the_model(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    scorer = FakeScorer(held=True)

    async def run() -> None:
        engine = make_engine(scorer)
        service = create_app(engine, default_label="LENGTH").state.service
        left = asyncio.Event()

        async def receive() -> dict[str, str]:
            await left.wait()
            return {"type": "http.disconnect"}

        request = Request({"type": "http", "headers": []}, receive)
        async with client_of(engine, default_label="LENGTH") as http:
            first = asyncio.create_task(http.post(wire.REWARDS_PATH, json={"items": [ITEM]}))
            await asyncio.to_thread(scorer.entered.acquire)
            gone = asyncio.create_task(service.score([("gone client", None)], request))
            left.set()
            with pytest.raises(ClientGoneError):
                await gone
            scorer.open()
            await first
            await http.post(wire.REWARDS_PATH, json={"items": [{"prompt": "", "response": "last"}]})

    asyncio.run(run())
    assert scorer.batches == [[5], [4]]


def test_the_cache_spares_the_model_what_it_has_judged_and_keeps_the_order(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    scorer = FakeScorer(packed=True)

    async def run() -> list[list[float]]:
        async with client_of(make_engine(scorer), default_label="LENGTH", cache=ScoreCache(2)) as http:
            answers = []
            for words in (["a", "bb"], ["ccc", "a"], ["a", "ccc"], ["bb"]):
                items = [{"prompt": "", "response": word} for word in words]
                answers.append((await http.post(wire.REWARDS_PATH, json={"items": items})).json()["rewards"])
            return answers

    assert asyncio.run(run()) == [[1, 2], [3, 1], [1, 3], [2]]
    assert scorer.batches == [[1, 2], [3], [2]], "bb was the least recently used of three and room is for two"


def test_a_reload_switches_the_model_and_a_broken_one_leaves_the_old(
    make_engine: Callable[..., Engine], client_of: Callable[..., Any]
) -> None:
    new = FakeScorer()
    new.revision = "sha256:new"
    loads: list[FakeScorer | None] = [None, new]

    def reload() -> FakeScorer:
        scorer = loads.pop(0)
        if scorer is None:
            raise ModelError("holds no weights")
        return scorer

    async def run() -> list[str]:
        async with client_of(make_engine(), default_label="LENGTH", reload=reload) as http:

            async def revision() -> str:
                return str((await http.post(wire.REWARDS_PATH, json={"items": [ITEM]})).json()["revision"])

            seen = [await revision()]
            refused = problem_of(await http.post("/v1/model:reload"))
            assert (refused.status, refused.type) == (409, wire.problem_type("reload-failed"))
            assert "holds no weights" in refused.detail
            seen.append(await revision())
            assert (await http.post("/v1/model:reload")).json()["revision"] == "sha256:new"
            return [*seen, await revision()]

    assert asyncio.run(run()) == ["sha256:fake", "sha256:fake", "sha256:new"]


MAGIC = re.compile("nan|poison|lost")
"""What the scorer that stands in for a model fails on."""
text = st.text(max_size=200).filter(lambda one: not MAGIC.search(one))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.tuples(text, text), min_size=1, max_size=20))
def test_any_text_gets_one_finite_reward_for_each_item(
    ask: Callable[..., httpx.Response], items: list[tuple[str, str]]
) -> None:
    body = {"items": [{"prompt": prompt, "response": response} for prompt, response in items], "label": "LENGTH"}
    answer = ask(body)
    empty = [index for index, (prompt, response) in enumerate(items) if not prompt + response]
    if empty:
        problem = problem_of(answer)
        assert (problem.status, problem.type, problem.item) == (422, wire.problem_type("no-tokens"), empty[0])
    else:
        assert answer.status_code == 200, answer.text
        assert answer.json()["rewards"] == [len(prompt + response) for prompt, response in items]


def test_a_defect_is_answered_with_an_id_and_counted_like_any_answer(make_engine: Callable[..., Engine]) -> None:
    app = create_app(make_engine())

    @app.get("/defect")
    async def defect() -> None:
        raise RuntimeError("a defect")

    async def run() -> tuple[httpx.Response, str]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://reward") as http:
            return await http.get("/defect", headers={"x-request-id": "mine"}), (await http.get("/metrics")).text

    answer, metrics = asyncio.run(run())
    assert problem_of(answer).type.endswith("internal-error")
    assert "a defect" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert 'status="500"' in metrics


def test_what_has_not_been_accepted_when_a_drain_turns_away_is_refused_from_then_on(
    make_engine: Callable[..., Engine],
) -> None:
    service = create_app(make_engine()).state.service

    async def run() -> None:
        service.refuse_unadmitted()
        with pytest.raises(ProblemError, match="shutting down"), service.refused_by_drain():
            pytest.fail("it was let in")

    asyncio.run(run())


def test_the_collector_looks_again_at_a_model_that_a_reload_replaced(make_engine: Callable[..., Engine]) -> None:
    old = FakeScorer()
    old.itself = old  # type: ignore[attr-defined]  # only the collector can tell that nobody else holds it
    gone = weakref.ref(old)
    engine = make_engine(old)
    service = create_app(engine, reload=FakeScorer).state.service
    garbage_collection.freeze()
    try:
        assert gc.get_freeze_count() > 0
        del old
        asyncio.run(service.reload_model())
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
