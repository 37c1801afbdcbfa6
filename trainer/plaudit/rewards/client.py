"""The reward client: futures and blocking calls on top of one background thread with an event loop."""

import asyncio
import contextlib
import functools
import operator
import os
import ssl
import threading
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from plaudit.errors import ConfigError
from plaudit.rewards.combining import combine
from plaudit.rewards.endpoint import Endpoint
from plaudit.rewards.function import FunctionSource
from plaudit.rewards.proxies import proxy_for
from plaudit.rewards.rendering import ByTemplate
from plaudit.rewards.rows import Columns, Prompt, Row, check_columns, rows_of
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.rewards.source import Source
from plaudit.wire import ModelInfo

API_KEY_VARIABLE = "PLAUDIT_REWARD_API_KEY"
CLOSE_TIMEOUT_S = 5.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Scores:
    """The rewards of a list of responses, in the same order."""

    totals: list[float]
    """The rewards of each response, combined as `RewardSettings.combination` says."""
    components: dict[str, list[float]]
    """Each reward by its name, before its weight."""


class RewardClient:
    """Scores completions over HTTP; use as a context manager.

    `fields` names the columns of the data, so that `connect` can refuse a reward that needs another one; None if they
    are not known yet. `on_wait` is called from the client's thread with a description of what it waits for, and with ""
    when the wait is over.
    Raises `ConfigError` if there is no URL or function, or a file or function in the settings can't be loaded.
    """

    def __init__(
        self,
        settings: RewardSettings,
        *,
        fields: Collection[str] | None = None,
        on_wait: Callable[[str], None] | None = None,
        environment_key: bool = True,
    ) -> None:
        """Turn `environment_key` off for rewards that the key in PLAUDIT_REWARD_API_KEY is not meant for."""
        self._settings = settings
        self._components = settings.components
        if not settings.says_whom_to_ask:
            raise ConfigError(
                "reward.url is empty: give the reward service's address, for example --reward.url http://127.0.0.1:8000"
            )
        # The key in the environment is meant for the first reward. Other URLs may belong to another organisation.
        self._clients = {
            c.name: _http_client(
                c, settings, os.environ.get(API_KEY_VARIABLE) if environment_key and index == 0 else None
            )
            for index, c in enumerate(self._components)
            if c.function is None
        }

        def open_source(component: RewardComponent) -> Source | FunctionSource:
            if component.function is not None:
                return FunctionSource(component, settings, fields=fields)
            http = self._clients[component.name]
            rendering = ByTemplate(component.render) if component.render is not None else None
            endpoints = [
                Endpoint(
                    url,
                    component,
                    http,
                    settings.request_timeout_s,
                    settings.max_in_flight,
                    proxy=proxy_for(url, os.environ),
                    rendering=rendering,
                )
                for url in component.url
            ]
            return Source(component, settings, endpoints, on_wait, fields=fields)

        self._sources = [open_source(component) for component in self._components]
        self._closed = False
        self._under_way: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

    @property
    def revision(self) -> str:
        """The reward model's revision; `name=revision` of each if there are several. `RuntimeError` before
        `connect`."""
        revisions = {c.name: s.revision for c, s in zip(self._components, self._sources, strict=True)}
        if None in revisions.values():
            raise RuntimeError("the revision is not known before connect()")
        if len(revisions) == 1:
            return str(next(iter(revisions.values())))
        return ", ".join(f"{name}={revision}" for name, revision in revisions.items())

    def connect(self) -> ModelInfo:
        """Wait until each reward has a ready endpoint, and check labels and order. Returns the first description.

        Raises `RewardUnavailable` after `patience_s`, and `RewardRejected` if waiting can't help.
        """
        return self.connecting().result()

    def connecting(self) -> Future[ModelInfo]:
        """`connect` without blocking. It takes at most `patience_s` and can be cancelled."""

        async def first() -> ModelInfo:
            return (await _all([source.connect() for source in self._sources]))[0]

        return self._start(first())

    def submit(
        self, prompts: Sequence[Prompt], responses: Sequence[str], fields: Columns | None = None
    ) -> Future[list[float]]:
        """Request rewards without blocking: a future of one reward per response, in order, or of a `RewardError`.

        A prompt is a text, or the messages that the response answers. `fields` are columns with one value per response.
        Each reward receives the columns that it asks for; a missing value is refused (`RewardRejected`). Several
        rewards are combined (`RewardSettings.combination`).

        The future takes at most `patience_s` plus the time of a request. `cancel` cancels the requests.
        """
        columns = self._checked(prompts, responses, fields)

        async def totals() -> list[float]:
            return (await self._score(list(prompts), list(responses), columns)).totals

        return self._start(totals())

    def submit_components(
        self, prompts: Sequence[Prompt], responses: Sequence[str], fields: Columns | None = None
    ) -> Future[Scores]:
        """`submit`, with the individual rewards in addition to the combined ones."""
        columns = self._checked(prompts, responses, fields)
        return self._start(self._score(list(prompts), list(responses), columns))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], fields: Columns | None = None) -> list[float]:
        """`submit`, and wait for the result."""
        return self.submit(prompts, responses, fields).result()

    def close(self) -> None:
        """Cancel pending requests and end the thread, within a few seconds."""
        if self._closed:
            return
        self._closed = True
        for future in list(self._under_way):
            future.cancel()
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, prompts: Sequence[Prompt], responses: Sequence[str], fields: Columns | None) -> Columns:
        """A copy of the columns. Raises `ValueError` if the counts differ."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one response a prompt is needed")
        if any(source.revision is None for source in self._sources):
            raise RuntimeError("call connect() first")
        check_columns(fields or {}, len(responses))
        return {name: list(column) for name, column in (fields or {}).items()}

    async def _score(self, prompts: list[Prompt], responses: list[str], columns: Columns) -> Scores:
        rows = rows_of(prompts, responses, columns)
        rewards = await _all([_in_chunks(source, rows) for source in self._sources])
        weights = [component.weight for component in self._components]
        total = functools.partial(
            combine, combination=self._settings.combination, std_multiple=self._settings.std_multiple
        )
        return Scores(
            totals=[total(list(map(operator.mul, weights, of_text))) for of_text in zip(*rewards, strict=True)],
            components={c.name: r for c, r in zip(self._components, rewards, strict=True)},
        )

    async def _shut(self) -> None:
        # Our tasks have been cancelled and cancel their own subtasks. Libraries' tasks get some time to end by
        # themselves.
        for grace_s in (CLOSE_TIMEOUT_S / 10, CLOSE_TIMEOUT_S / 4):
            late = asyncio.all_tasks() - {asyncio.current_task()}
            if late:
                _, late = await asyncio.wait(late, timeout=grace_s)
            for task in late:
                task.cancel()
        for http in self._clients.values():
            await http.aclose()

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._closed:
            work.close()
            raise RuntimeError("the reward client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future


async def _in_chunks(source: Source | FunctionSource, rows: Sequence[Row]) -> list[float]:
    answers = await _all([source.score(chunk) for chunk in source.chunks(rows)])
    return [reward for answer in answers for reward in answer.rewards]


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results in order. The first failure cancels the other tasks and is raised unchanged."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return [task.result() for task in tasks]


def _http_client(component: RewardComponent, settings: RewardSettings, key: str | None) -> httpx.AsyncClient:
    in_flight = settings.max_in_flight * len(component.url)
    tls = _tls(component)
    # Hedged chunks and descriptions may be in flight in addition to the chunks.
    limits = httpx.Limits(max_connections=2 * in_flight, max_keepalive_connections=in_flight)
    return httpx.AsyncClient(
        headers=_headers(component, key),
        verify=tls,
        timeout=httpx.Timeout(settings.request_timeout_s, connect=settings.connect_timeout_s),
        limits=limits,
        # With trust_env, httpx would read all proxy variables and fail on an invalid one.
        trust_env=False,
        mounts=_ways(component, tls, limits),
    )


def _ways(
    component: RewardComponent, tls: ssl.SSLContext, limits: httpx.Limits
) -> dict[str, httpx.AsyncBaseTransport | None]:
    """The transport for each endpoint behind a proxy."""
    ways: dict[str, httpx.AsyncBaseTransport | None] = {}
    for url in component.url:
        proxy = proxy_for(url, os.environ)
        if proxy is not None:
            place = urlsplit(url)
            where = f"{place.scheme}://{place.netloc.rpartition('@')[2]}"
            ways[where] = httpx.AsyncHTTPTransport(verify=tls, limits=limits, proxy=proxy.url)
    return ways


def _headers(component: RewardComponent, key: str | None) -> dict[str, str]:
    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "plaudit"}
    key = key.strip() if key is not None else None
    if component.api_key_file is not None:
        try:
            key = component.api_key_file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"reward.api_key_file={component.api_key_file} can't be read: {error}") from error
    if key:
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(
                f"the key in {component.api_key_file or API_KEY_VARIABLE} must be one line of plain ASCII"
            )
        headers["Authorization"] = f"Bearer {key}"
    for line in component.header:
        name, _, value = line.partition(":")
        headers[name.strip()] = value.strip()
    return headers


def _tls(component: RewardComponent) -> ssl.SSLContext:
    if not any(url.startswith("https:") for url in component.url):
        # Never used. Loading the system's certificate authorities would take 0.2 s.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        return ssl.create_default_context(cafile=component.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"reward.ca_file={component.ca_file} can't be used: {error}") from error
