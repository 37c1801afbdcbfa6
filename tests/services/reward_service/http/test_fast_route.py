"""The short way to the rewards and the ordinary one beside it: the same answers, the same refusals, the same counts."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import msgpack
import pytest
from fastapi import FastAPI

from plaudit import wire
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.engine.cache import ScoreCache
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.rewards import FastRouteMiddleware
from plaudit.reward_service.http.service import ServiceLimits

ITEMS = [{"prompt": "ab", "response": "cde"}, {"prompt": "", "response": "f" * 20}]
JSON = {"content-type": "application/json"}
PACKED = {"content-type": "application/msgpack"}
REQUESTS: list[tuple[str, dict[str, str], bytes]] = [
    ("one label", JSON, json.dumps({"items": ITEMS, "label": "MINUS"}).encode()),
    ("the default label", {}, json.dumps({"items": ITEMS}).encode()),
    ("msgpack", PACKED, msgpack.packb({"items": ITEMS})),
    ("msgpack wanted", JSON | {"accept": "application/msgpack"}, json.dumps({"items": ITEMS}).encode()),
    ("a deadline", JSON | {"x-request-timeout": "30"}, json.dumps({"items": ITEMS}).encode()),
    ("no deadline at all", JSON | {"x-request-timeout": "soon"}, json.dumps({"items": ITEMS}).encode()),
    ("unknown label", JSON, json.dumps({"items": ITEMS, "label": "NOPE"}).encode()),
    ("no JSON", JSON, b"{"),
    ("half a surrogate", JSON, b'{"items": [{"prompt": "\\ud800", "response": ""}]}'),
    ("another field", JSON, json.dumps({"items": ITEMS, "temperature": 1}).encode()),
    ("nothing", JSON, b'{"items": []}'),
    ("too many", JSON, json.dumps({"items": ITEMS * 3}).encode()),
    ("too long", JSON, json.dumps({"items": [{"prompt": "a" * 60, "response": ""}]}).encode()),
    ("too large", JSON, b" " * 3000),
    ("no text", {"content-type": "text/csv"}, b"a,b"),
    ("no tokens", JSON, json.dumps({"items": [{"prompt": "", "response": ""}]}).encode()),
    ("poison", JSON, json.dumps({"items": [{"prompt": "poison", "response": ""}]}).encode()),
    ("not finite", JSON, json.dumps({"items": [{"prompt": "nan", "response": ""}]}).encode()),
    ("a wrong key", JSON | {"authorization": "Bearer wrong"}, json.dumps({"items": ITEMS}).encode()),
]


@pytest.fixture
def ways(make_engine: Callable[..., Engine]) -> Callable[..., tuple[FastAPI, FastAPI]]:
    """The same service twice: as it is, and without the short way."""

    def make(**options: Any) -> tuple[FastAPI, FastAPI]:
        limits = ServiceLimits(max_items=4, max_text_chars=50, max_body_bytes=2000)
        short, ordinary = (
            create_app(make_engine(), limits=limits, default_label="LENGTH", api_keys=["key"], **options)
            for _ in range(2)
        )
        ordinary.user_middleware = [each for each in ordinary.user_middleware if each.cls is not FastRouteMiddleware]
        assert len(ordinary.user_middleware) == len(short.user_middleware) - 1
        return short, ordinary

    return make


async def answer(app: FastAPI, headers: dict[str, str], content: bytes) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://reward") as http:
        sent = {"authorization": "Bearer key", "x-request-id": "7"} | headers
        return await http.post(wire.REWARDS_PATH, content=content, headers=sent)


def counts(app: FastAPI) -> list[str]:
    """What is counted of requests, without times."""
    lines = app.state.service.engine.metrics.exposition().decode().splitlines()
    return [line for line in lines if "_created" not in line and line.startswith("plaudit_reward_re")]


@pytest.mark.parametrize("cached", [False, True])
def test_both_ways_answer_and_refuse_alike(ways: Callable[..., tuple[FastAPI, FastAPI]], cached: bool) -> None:
    short, ordinary = ways(cache=ScoreCache(100)) if cached else ways()
    for name, headers, content in REQUESTS:
        first, second = (asyncio.run(answer(app, headers, content)) for app in (short, ordinary))
        assert (first.status_code, first.content) == (second.status_code, second.content), name
        timing = ("server-timing",) if first.status_code == 200 else ()
        assert first.headers.keys() == second.headers.keys(), name
        for header in first.headers.keys() - set(timing):
            assert first.headers[header] == second.headers[header], name
    assert counts(short) == counts(ordinary)
    assert any("/v1/rewards" in line for line in counts(short))


def test_other_methods_of_the_same_path_go_the_ordinary_way(ways: Callable[..., tuple[FastAPI, FastAPI]]) -> None:
    async def get() -> int:
        transport = httpx.ASGITransport(ways()[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://reward") as http:
            response = await http.get(wire.REWARDS_PATH, headers={"authorization": "Bearer key"})
            return response.status_code

    assert asyncio.run(get()) == 405
