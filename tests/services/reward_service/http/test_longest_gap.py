"""No request keeps the event loop for long: neither the largest valid one, on any route, nor any that is hostile."""

import asyncio
import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import msgpack
import pytest

from harness.load.large_bodies import bodies
from plaudit.reward_service.engine.batching import Encoded, Engine
from plaudit.reward_service.engine.scorer import TransformersScorer, load_scorer
from plaudit.reward_service.http import garbage_collection
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.settings import Settings

MOST_S = 0.05
LARGEST = 16 * 2**20
INFER = "/v2/models/reward/infer"
MESSAGE = {"role": "user", "content": "a film that is good"}
BINARY = json.dumps(
    {"inputs": [{"name": "t", "datatype": "BYTES", "shape": [10**6], "parameters": {"binary_data_size": 4 * 10**6}}]}
).encode()
HOSTILE: dict[str, Callable[[], tuple[str, bytes, dict[str, str]]]] = {
    "a shape of large integers": lambda: (
        INFER,
        b'{"inputs":[{"name":"t","datatype":"BYTES","data":["a"],"shape":[%s]}]}' % b",".join([b"9" * 4000] * 1000),
        {},
    ),
    "a million unknown keys": lambda: ("/v1/rewards", b"{%s}" % b",".join(b'"k%d":1' % i for i in range(10**6)), {}),
    "four million empty strings": lambda: ("/get_reward", b'{"query":[%s]}' % b",".join([b'""'] * 4 * 10**6), {}),
    "a million empty binary strings": lambda: (
        INFER,
        BINARY + bytes(4 * 10**6),
        {"inference-header-content-length": str(len(BINARY))},
    ),
    "eight million integers in msgpack": lambda: (
        "/v1/rewards",
        msgpack.packb({"items": [1] * 8 * 10**6}),
        {"content-type": "application/msgpack"},
    ),
    "items that are all wrong": lambda: ("/v1/rewards", json.dumps({"items": [{"a": 1, "b": 2}] * 1024}).encode(), {}),
    "texts that are all wrong": lambda: ("/predict", json.dumps({"inputs": [[1] * 8] * 1024}).encode(), {}),
    "brackets": lambda: ("/classify", b"[" * LARGEST, {}),
    "one string of escapes": lambda: ("/v1/rewards", b'{"items":["%s"]}' % (rb"\u00e9" * 2_700_000), {}),
    "a string without an end": lambda: ("/pooling", b'{"input":"' + b"\\n" * 8_000_000, {}),
    "spaces": lambda: ("/predict", b"{" + b" " * (LARGEST - 2) + b"}", {}),
    "as many messages as a body may hold, for a service that takes texts": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": [MESSAGE] * 3, "response": "b"}] * 900}).encode(),
        {},
    ),
    "messages of megabytes, for a service that takes texts": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": [{**MESSAGE, "content": "b" * 900}] * 1000, "response": ""}] * 3}).encode(),
        {},
    ),
    "messages that are all wrong": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": [{"role": 1}] * 1000, "response": "b"}] * 5}).encode(),
        {},
    ),
    "messages that are no objects": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": [1] * 1000, "response": "b"}] * 17}).encode(),
        {},
    ),
    "as many fields' values as a body may hold, and then a wrong one": lambda: (
        "/v1/rewards",
        json.dumps(
            {"items": [{"prompt": "a", "response": "b", "fields": {"x": [1.5, "a"] * 2000}}] * 4 + [{"prompt": 3}]}
        ).encode(),
        {},
    ),
    "fields that are too many": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": "a", "response": "b", "fields": {"x": [[1]] * 8000}}]}).encode(),
        {},
    ),
    "fields in fields": lambda: (
        "/v1/rewards",
        b'{"items":[{"prompt":"a","response":"b","fields":%s1%s}]}' % (b'{"a":' * 30, b"}" * 30),
        {},
    ),
    "fields in fields in a large body": lambda: (
        "/v1/rewards",
        b'{"items":[{"prompt":"a","response":"%s","fields":%s1%s}]}' % (b"b" * 40_000, b'{"a":' * 500, b"}" * 500),
        {},
    ),
    "a label of megabytes": lambda: (
        "/v1/rewards",
        json.dumps({"items": [{"prompt": "a", "response": "b"}], "label": "L" * 15 * 10**6}).encode(),
        {},
    ),
}


@pytest.fixture(scope="module")
def scorer() -> TransformersScorer:
    """The embedded model with its own tokenizer. Its forward pass is left out: it doesn't run on the event loop."""
    scorer = load_scorer(Settings(model="imdb-distilbert-mini", threads=1))

    def score(batch: list[Encoded], replica: int) -> list[tuple[float, ...]]:
        return [(0.0, 0.0)] * len(batch)

    scorer.score = score  # type: ignore[method-assign, assignment]
    return scorer


@pytest.fixture
def engine(scorer: TransformersScorer) -> Iterator[Engine]:
    engine = Engine(scorer, batch_tokens=1024, max_queue_tokens=65_536).start()
    thresholds = gc.get_threshold()
    garbage_collection.freeze()  # as the program does when it is ready
    yield engine
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    engine.close()


def longest_turn(engine: Engine, path: str, body: bytes, headers: dict[str, str]) -> tuple[float, httpx.Response]:
    """CPU seconds of the longest turn that the event loop took, whatever else runs on this machine."""
    app = create_app(engine, default_label="POSITIVE")
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        before = time.thread_time()
        while True:
            await asyncio.sleep(0.0005)
            now = time.thread_time()
            longest = max(longest, now - before)
            before = now

    async def run() -> httpx.Response:
        async def sent() -> Any:
            for start in range(0, len(body), 65536):
                yield body[start : start + 65536]

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://reward") as http:
            await http.get("/livez")
            watching = asyncio.create_task(watch())
            answer = await http.post(path, content=sent(), headers={"content-type": "application/json"} | headers)
            watching.cancel()
            return answer

    answer = asyncio.run(run())
    return longest, answer


def test_the_largest_valid_body_of_every_route(engine: Engine) -> None:
    asked = []
    document = create_app(engine).openapi()
    for path, name, body in bodies(document, LARGEST, 1000):
        seconds, answer = longest_turn(engine, path, body, {})
        # This service joins strings. A conversation is read and checked whole before it is refused.
        assert answer.status_code == 200 or "strings-only" in answer.text, (path, name, answer.text[:300])
        assert seconds < MOST_S, f"{path} ({name}): {seconds * 1000:.0f} ms in one turn for {len(body)} bytes"
        asked.append(path)
    expected = {path for path, methods in document["paths"].items() if "requestBody" in methods.get("post", {})}
    assert len(set(asked)) == len(expected)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile(engine: Engine, name: str) -> None:
    path, body, headers = HOSTILE[name]()
    seconds, answer = longest_turn(engine, path, body, headers)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 10_000
    assert seconds < MOST_S, f"{seconds * 1000:.0f} ms in one turn"


def test_a_route_that_is_added_later_is_measured_too() -> None:
    """The bodies come from the document, so that a route that is added later is measured too."""
    document = {
        "paths": {
            "/new": {
                "post": {
                    "requestBody": {"content": {"application/json": {"examples": {"x": {"value": {"t": ["a b"]}}}}}}
                }
            }
        }
    }
    [(path, name, body)] = bodies(document, 1_000_000, 10)
    assert (path, name, len(json.loads(body)["t"])) == ("/new", "x", 10)
