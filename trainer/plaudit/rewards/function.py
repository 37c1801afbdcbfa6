"""A Python function as a reward, with the same rules as for a server: an exception is an error, never a number."""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from plaudit.errors import ConfigError
from plaudit.rewards.errors import Exchange, RewardRejected, RewardUnavailable
from plaudit.rewards.rendering import as_dicts
from plaudit.rewards.rows import Row, check_names
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.wire import MAX_ITEMS_PER_REQUEST, MAX_TEXT_CHARS, ChatMessage, Limits, ModelInfo, RewardResponse

Given = str | list[dict[str, str]]
"""A prompt as functions receive it."""


class FunctionSource:
    """Calls a function with a chunk's prompts and responses, one call at a time because it may not be thread-safe.

    The function also receives the columns that its further parameters name, or all columns if it has `**columns`. A
    parameter without a default needs a value in every row. Conversations are passed as lists of `{"role", "content"}`.

    A synchronous function runs in a separate thread. If it exceeds the timeout, it can't be stopped, but its result is
    dropped. Raises `ConfigError` if there is no such function.
    """

    def __init__(
        self, component: RewardComponent, settings: RewardSettings, *, fields: Collection[str] | None = None
    ) -> None:
        assert component.function is not None
        self._name = component.function
        self._function = load(component.function)
        self._timeout_s = settings.request_timeout_s
        self._turn = asyncio.Lock()
        self._chunk_size = settings.chunk_size
        self._parameters = _further_parameters(self._function)
        self._fields = fields
        self.revision: str | None = None

    async def connect(self) -> ModelInfo:
        """Describe the function. Raises `RewardRejected` if the data is known to lack a column that it needs."""
        check_names(self._parameters.needed, self._fields, self._asked_by)
        limits = Limits(
            max_items=MAX_ITEMS_PER_REQUEST,
            max_text_chars=MAX_TEXT_CHARS,
            max_body_bytes=sys.maxsize,
            max_tokens=sys.maxsize,
        )
        self.revision = _revision(self._function)
        return ModelInfo(id=self._name, revision=self.revision, labels=[], limits=limits)

    @property
    def _asked_by(self) -> str:
        return f"the reward function {self._name}"

    def chunks(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """The rows split into chunks, one for each call."""
        return [rows[start : start + self._chunk_size] for start in range(0, len(rows), self._chunk_size)]

    async def score(self, rows: Sequence[Row]) -> RewardResponse:
        """The function's rewards. Raises `RewardRejected`, or `RewardUnavailable` after the timeout."""
        prompts = [_as_given(row.item.prompt) for row in rows]
        responses = [row.item.response for row in rows]
        columns = {name: [row.needed(name, self._asked_by) for row in rows] for name in self._parameters.needed}
        there_are = rows[0].columns
        optional = there_are if self._parameters.any else [n for n in self._parameters.optional if n in there_are]
        columns |= {name: [there_are[name][row.place] for row in rows] for name in optional if name not in columns}
        exchange = Exchange("CALL", self._name, repr({"prompts": prompts, "responses": responses, **columns}))
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._call(prompts, responses, columns)
            except TimeoutError as error:
                raise RewardUnavailable(
                    f"the reward function {self._name} took more than {self._timeout_s:g} s (reward.request_timeout_s)"
                ) from error
            except Exception as error:
                raise RewardRejected(
                    f"the reward function {self._name} failed: {type(error).__name__}: {error}",
                    Exchange("CALL", self._name, exchange.request, answer=traceback.format_exc()),
                ) from error
        answered = Exchange("CALL", self._name, exchange.request, answer=repr(answer))
        try:
            rewards = _numbers(answer)
        except Exception as error:  # A generator runs the function's own code here.
            raise RewardRejected(
                f"the reward function {self._name} gave no list of numbers: {error}", answered
            ) from error
        if len(rewards) != len(rows):
            raise RewardRejected(
                f"the reward function {self._name} got {len(rows)} texts and gave {len(rewards)} numbers", answered
            )
        if not all(map(math.isfinite, rewards)):
            raise RewardRejected(f"the reward function {self._name} gave a number that is not finite", answered)
        assert self.revision is not None
        return RewardResponse(rewards=rewards, model=self._name, revision=self.revision)

    async def _call(self, prompts: list[Given], responses: list[str], columns: dict[str, list[Any]]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(prompts, responses, **columns)
        answer = await _in_a_thread(lambda: self._function(prompts, responses, **columns))
        return await answer if inspect.isawaitable(answer) else answer


@dataclass(frozen=True)
class _Parameters:
    """A function's parameters after prompts and responses."""

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    any: bool = False


def _further_parameters(function: Callable[..., Any]) -> _Parameters:
    try:
        parameters = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):  # some functions in C have no signature
        return _Parameters()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return _Parameters(
        needed=tuple(p.name for p in named if p.default is p.empty),
        optional=tuple(p.name for p in named if p.default is not p.empty),
        any=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _as_given(prompt: str | list[ChatMessage]) -> Given:
    return prompt if isinstance(prompt, str) else as_dicts(prompt)


def _numbers(answer: Any) -> list[float]:
    rewards = list(answer)
    if isinstance(answer, str) or any(isinstance(reward, str) for reward in rewards):
        raise TypeError("it gave text")
    return [float(reward) for reward in rewards]


def load(name: str) -> Callable[..., Any]:
    """The function `file.py:name`, or `module:name`, which is also looked for in the working directory.

    Raises:
        ConfigError: there is no such file, module or function, or importing it fails.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else _importable(where)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"reward.function={name!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward.function={name!r} is not a function")
    return function  # type: ignore[no-any-return]


def _importable(module: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(module)


def _of_file(path: Path) -> ModuleType:
    """The module in a file. What it imports is also looked for beside it."""
    path = path.resolve()
    if not path.is_file():
        raise ImportError(f"{path}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # Under a name of its own, so that a file called json.py takes no other module's place.
    name = f"plaudit_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _revision(function: Callable[..., Any]) -> str:
    """A hash of the function's source file, so that a resumed run detects a change."""
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return "function"
    return f"function:{hashlib.sha256(source).hexdigest()[:16]}"


def _in_a_thread(work: Callable[[], Any]) -> Awaitable[Any]:
    """Like `asyncio.to_thread`, but the interpreter does not wait for a hung call when it exits."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(answer: Any, error: Exception | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(answer)
        else:
            done.set_exception(error)

    def run() -> None:
        answer: Any = None
        failure: Exception | None = None
        try:
            answer = work()
        except StopIteration as error:
            failure = RuntimeError(f"StopIteration: {error}")  # A future takes none.
        except Exception as error:
            failure = error
        except BaseException as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")  # It would end the event loop.
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, answer, failure)

    threading.Thread(target=run, name="reward-function", daemon=True).start()
    return done
