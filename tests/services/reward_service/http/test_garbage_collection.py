"""A request leaves nothing that only the garbage collector could free: a full collection holds up all requests."""

import asyncio
import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from harness.scorers import FakeScorer
from plaudit import wire
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http.app import create_app


async def status_of(app: FastAPI, text: str, timeout_s: bytes) -> int:
    """POST to the application without a client's own objects between."""
    statuses: list[int] = []
    body = json.dumps({"items": [{"prompt": text, "response": ""}] * 3}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    where = {"type": "http", "method": "POST", "path": wire.REWARDS_PATH, "query_string": b""}
    headers = [(b"content-type", b"application/json"), (b"x-request-timeout", timeout_s)]
    await app(where | {"headers": headers}, receive, send)
    return statuses[0]


@pytest.mark.parametrize(
    ("text", "held", "status"),
    [("fine", False, 200), ("", False, 422), ("poison", False, 500), ("too late", True, 504)],
)
def test_a_request_leaves_nothing_to_collect(
    make_engine: Callable[..., Engine], text: str, held: bool, status: int
) -> None:
    scorer = FakeScorer(held=held)
    engine = make_engine(scorer)
    app = create_app(engine, default_label="LENGTH")
    timeout_s = b"0.01" if held else b"60"
    assert asyncio.run(status_of(app, text, timeout_s)) == status
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        assert asyncio.run(status_of(app, text, timeout_s)) == status
        scorer.open()
        engine.close()
        gc.collect()
        ours = [type(each).__name__ for each in gc.garbage if type(each).__module__.startswith("plaudit.")]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert ours == []
