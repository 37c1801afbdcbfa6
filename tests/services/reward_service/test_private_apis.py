"""The undocumented parts of other libraries: versions they are tested with, and equal rewards where one is missing."""

import asyncio
import contextlib
import importlib.metadata
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from plaudit.reward_service.engine import packed
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.engine.scorer import load_scorer
from plaudit.reward_service.http import memory_budget, server
from plaudit.reward_service.http.app import create_app
from plaudit.reward_service.http.server import Hooks, Server
from plaudit.reward_service.private_apis import TESTED, PrivateApi, fallbacks
from plaudit.reward_service.settings import Settings

WHAT_TO_CHECK = {
    "torch": "torch.ops.mkldnn._reorder_linear_weight, _linear_pointwise and torch.ops.onednn.qlinear_* as "
    "torch/_inductor/mkldnn_lowerings.py calls them, against engine/packed.py",
    "uvicorn": "uvicorn/protocols/http/httptools_impl.py, every name that http/connection.py overrides or reads; and "
    "Server.startup, shutdown and capture_signals against http/server.py and plaudit/serving/server.py",
    "httptools": "HttpRequestParser: its callbacks, and which requests it accepts (test_connections.py)",
}
TEXTS = ["A wonderful film.", "Dreadful, from the first minute to the last.", "", "the " * 40]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


@pytest.mark.parametrize("library", TESTED)
def test_the_installed_version_is_one_that_the_private_parts_were_tested_with(library: str) -> None:
    first, beyond = TESTED[library]
    installed = importlib.metadata.version(library)
    assert numbers(first) <= numbers(installed) < numbers(beyond), (
        f"{library} {installed} is installed, and plaudit.reward_service.private_apis.TESTED says {first} to below "
        f"{beyond}. Read {WHAT_TO_CHECK[library]}; run tests/services/reward_service; then change TESTED."
    )


def rewards(directory: Path, dtype: str) -> list[tuple[float, ...]]:
    scorer = load_scorer(Settings(model=str(directory), dtype=dtype))  # type: ignore[arg-type]
    assert scorer.batching == "packed"
    return list(scorer.score(scorer.encode([(text, None) for text in TEXTS]), 0))


@pytest.mark.parametrize(
    ("dtype", "api", "tolerance"),
    [
        ("fp32", packed.PREPACKED_PRODUCT[torch.float32], 1e-5),
        ("bf16", packed.PREPACKED_PRODUCT[torch.bfloat16], 3e-2),
        ("int8", packed.INT8_PRODUCT, 1e-5),
    ],
)
def test_without_onednns_private_products_the_rewards_are_the_same(
    classifier_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, api: PrivateApi, tolerance: float
) -> None:
    fast = rewards(classifier_dir, dtype)
    assert api.checked
    monkeypatch.setattr(api, "problem", "taken away by this test")
    assert api in fallbacks()
    slow = rewards(classifier_dir, dtype)
    torch.testing.assert_close(torch.tensor(slow), torch.tensor(fast), atol=tolerance, rtol=tolerance)


def test_a_product_that_changed_its_meaning_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed._check_prepacked_product(dtype)
    product = packed._prepacked_product
    # As if the name of the exact GELU came to mean the one with tanh.
    monkeypatch.setattr(
        packed,
        "_prepacked_product",
        lambda weight, bias, *, with_gelu: (
            lambda rows: (
                torch.nn.functional.gelu(product(weight, bias)(rows), approximate="tanh")
                if with_gelu
                else product(weight, bias)(rows)
            )
        ),
    )
    with pytest.raises(RuntimeError, match=r"is .*e-0\d from the exact one \(with_gelu=True\)"):
        packed._check_prepacked_product(torch.float32)


def test_a_missing_part_is_named_in_one_line_and_checked_once() -> None:
    checks = []

    def check() -> None:
        checks.append(1)
        raise AttributeError("module 'x' has no attribute 'y'\nmore")

    api = PrivateApi("x.y", fallback="z", check=check)
    assert not api.checked
    assert (api.usable, api.usable, len(checks)) == (False, False, 1)
    assert api.problem == "AttributeError: module 'x' has no attribute 'y'"
    assert api in fallbacks()
    api.__dict__.pop("problem")  # no fallback of the service's own


@contextmanager
def serving(engine: Engine, **options: Any) -> Iterator[tuple[str, list[tuple[str, dict[str, object]]]]]:
    """The real server on an event loop in a thread, shut down in order; its URL and what it logs."""
    logged: list[tuple[str, dict[str, object]]] = []
    app = create_app(engine, default_label="LENGTH", **options)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def reload() -> None: ...

    hooks = Hooks(ready.set, reload, lambda event, **details: logged.append((event, details)))
    running = Server(app, 600.0, hooks)
    running.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    loop.add_signal_handler = lambda *_: None  # type: ignore[method-assign]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: loop.run_until_complete(running.serve(sockets=[listener])))
        thread.start()
        assert ready.wait(30)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", logged
        running.begin_drain()
        running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
    loop.close()


def answered(url: str) -> tuple[int, object, str | None]:
    with httpx.Client(base_url=url) as http:
        items = [{"prompt": "ab", "response": "cde"}, {"prompt": "x" * 40, "response": ""}]
        response = http.post("/v1/rewards", json={"items": items, "label": "LENGTH"}, headers={"x-request-id": "7"})
        oversized = http.get("/v1/model", headers={"x-much": "x" * 70_000})
        assert oversized.status_code in (400, 431)
    return response.status_code, response.json(), response.headers.get("x-request-id")


def test_without_uvicorns_httptools_class_and_socket_filters_the_answers_are_the_same(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(make_engine()) as (url, _):
        fast = answered(url)
    assert server.HTTPTOOLS.usable, server.HTTPTOOLS.problem
    monkeypatch.setattr(server.HTTPTOOLS, "problem", "taken away by this test")
    monkeypatch.setattr(server.SOCKET_FILTER, "problem", "taken away by this test")
    with serving(make_engine()) as (url, logged):
        assert answered(url) == fast
    assert fast[0] == 200
    missing = [str(details["missing"]) for event, details in logged if event == "fallback"]
    assert [server.HTTPTOOLS.name, server.SOCKET_FILTER.name] == [
        name for name in missing if name in (server.HTTPTOOLS.name, server.SOCKET_FILTER.name)
    ]
    assert [event for event, _ in logged][-1] == "drained"
    assert all(len(json.dumps(details)) < 500 for _, details in logged)


def test_a_uvicorn_class_that_changed_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from plaudit.reward_service.http import connection

    monkeypatch.setattr(connection.Connection, "on_headers_complete", lambda self: None)
    with pytest.raises((AttributeError, IndexError, RuntimeError)):
        server._check_httptools()


def test_without_malloc_trim_no_thread_is_started_after_a_large_request(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(memory_budget, "TRIM_AFTER_S", 0.0)
    monkeypatch.setattr(memory_budget, "trim_heap", lambda: trims.append(1))

    async def release_a_large_reservation() -> None:
        reservation = memory_budget.Reservation(memory_budget.MemoryBudget(2**30))
        reservation.grow(memory_budget.LARGE_BYTES)
        reservation.release()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for thread in [each for each in threading.enumerate() if each.name == "trim"]:
            thread.join(30)

    monkeypatch.setattr(memory_budget.MALLOC_TRIM, "problem", "musl has none")
    asyncio.run(release_a_large_reservation())
    assert trims == []
    monkeypatch.setattr(memory_budget.MALLOC_TRIM, "problem", None)
    asyncio.run(release_a_large_reservation())
    assert trims == [1]
