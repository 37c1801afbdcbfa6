"""The trainer's side of the wire: futures and plain calls over one background thread with an event loop."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import ValidationError

from services.wire import ModelInfo, RewardItem
from trainer.config import ConfigError, RewardSettings
from trainer.reward_client.dialects.plaudit import Plaudit
from trainer.reward_client.endpoint import Endpoint
from trainer.reward_client.errors import RewardRejected
from trainer.reward_client.source import Source

API_KEY_VARIABLE = "PLAUDIT_REWARD_API_KEY"
CLOSE_TIMEOUT_S = 5.0

Result = TypeVar("Result")


class RewardClient:
    """Scores completions over HTTP; use as a context manager.

    `on_wait` is told, from the client's own thread, what is being waited for, and "" when the wait is over.
    Raises `ConfigError` when no URL is given or the key can't be read.
    """

    def __init__(self, settings: RewardSettings, *, on_wait: Callable[[str], None] | None = None) -> None:
        if not settings.url:
            raise ConfigError(
                "reward.url is empty: give the reward service's address, --reward.url http://127.0.0.1:8000"
            )
        headers = _headers(settings)
        self._settings = settings
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

        async def open_source() -> tuple[httpx.AsyncClient, Source]:
            in_flight = settings.max_in_flight * len(settings.url)
            http = httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s),
                limits=httpx.Limits(max_connections=2 * in_flight, max_keepalive_connections=in_flight),
            )
            endpoints = [
                Endpoint(url, Plaudit(), http, request_timeout_s=settings.request_timeout_s) for url in settings.url
            ]
            return http, Source(settings, endpoints, on_wait)

        self._http, self._source = self._start(open_source()).result()

    @property
    def revision(self) -> str:
        """The reward model's revision. Raises `RuntimeError` before `connect`."""
        if self._source.revision is None:
            raise RuntimeError("the revision is not known before connect()")
        return self._source.revision

    def connect(self) -> ModelInfo:
        """Wait until the service is ready and check that it has the label.

        Raises `RewardUnavailable` when patience runs out, `RewardRejected` when waiting won't help.
        """
        return self._start(self._source.connect()).result()

    def submit(self, prompts: Sequence[str], responses: Sequence[str]) -> Future[list[float]]:
        """Ask for rewards without waiting: the future gives one for each response, in order, or raises `RewardError`.

        Its result is bounded by the patience and the time of a request; `cancel` takes the requests back.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one response a prompt is needed")
        if self._source.revision is None:
            raise RuntimeError("call connect() first")
        return self._start(self._score(list(prompts), list(responses)))

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """`submit`, and wait for it."""
        return self.submit(prompts, responses).result()

    async def _score(self, prompts: list[str], responses: list[str]) -> list[float]:
        try:
            items = [
                RewardItem(prompt=prompt, response=response)
                for prompt, response in zip(prompts, responses, strict=True)
            ]
        except ValidationError as error:
            raise RewardRejected(f"a text can't be sent: {error}") from error
        size = self._source.max_items
        try:
            async with asyncio.TaskGroup() as group:
                chunks = [
                    group.create_task(self._source.score(items[start : start + size]))
                    for start in range(0, len(items), size)
                ]
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [reward for chunk in chunks for reward in chunk.result().rewards]

    def close(self) -> None:
        """Take back what is under way and end the thread; waits a few seconds at most."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    async def _shut(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way, timeout=CLOSE_TIMEOUT_S / 2)
        await self._http.aclose()

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._closed:
            work.close()
            raise RuntimeError("the reward client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _headers(settings: RewardSettings) -> dict[str, str]:
    headers = {"Accept": "application/json", "User-Agent": "plaudit"}
    key = os.environ.get(API_KEY_VARIABLE)
    if settings.api_key_file is not None:
        try:
            key = settings.api_key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"reward.api_key_file={settings.api_key_file} can't be read: {error}") from error
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return headers
