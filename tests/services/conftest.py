from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.scorers import FakeScorer
from harness.tiny_models import tiny_classifier_dir
from plaudit.reward_service.engine.batching import Engine
from plaudit.reward_service.http.app import create_app


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier_dir(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(scorer: FakeScorer | None = None, *, batch_tokens: int = 512, max_queue_tokens: int = 100_000) -> Engine:
        engine = Engine(scorer or FakeScorer(), batch_tokens=batch_tokens, max_queue_tokens=max_queue_tokens)
        engines.append(engine)
        return engine.start()

    yield make
    for engine in engines:
        if isinstance(engine.scorer, FakeScorer):
            engine.scorer.open()
        engine.close()


@pytest.fixture
def client_of() -> Callable[..., Any]:
    @asynccontextmanager
    async def client(engine: Engine, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(create_app(engine, **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://reward") as http:
            yield http

    return client
