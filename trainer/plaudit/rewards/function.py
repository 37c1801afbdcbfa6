"""A Python function as a reward: the same rules as for a server. What it raises is an error, never a number."""

import asyncio
import hashlib
import importlib
import inspect
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigError
from plaudit.rewards.errors import Exchange, RewardRejected, RewardUnavailable
from plaudit.rewards.settings import RewardComponent, RewardSettings
from plaudit.wire import MAX_ITEMS_PER_REQUEST, MAX_TEXT_CHARS, Limits, ModelInfo, RewardItem, RewardResponse


class FunctionSource:
    """Calls `module:name` with a chunk's prompts and responses. One call at a time: it may not be thread-safe.

    A plain function runs in a thread of its own. One that exceeds the timeout can't be ended; its answer is dropped.
    Raises `ConfigError` when there is no such function.
    """

    def __init__(self, component: RewardComponent, settings: RewardSettings) -> None:
        assert component.function is not None
        self._name = component.function
        self._function = load(component.function)
        self._timeout_s = settings.request_timeout_s
        self._turn = asyncio.Lock()
        self.max_items = settings.chunk_size
        self.revision: str | None = None

    async def connect(self) -> ModelInfo:
        limits = Limits(
            max_items=MAX_ITEMS_PER_REQUEST,
            max_text_chars=MAX_TEXT_CHARS,
            max_body_bytes=sys.maxsize,
            max_tokens=sys.maxsize,
        )
        self.revision = _revision(self._function)
        return ModelInfo(id=self._name, revision=self.revision, labels=[], limits=limits)

    async def score(self, items: Sequence[RewardItem]) -> RewardResponse:
        """The function's numbers. Raises `RewardRejected`, or `RewardUnavailable` when it takes too long."""
        prompts, responses = [item.prompt for item in items], [item.response for item in items]
        exchange = Exchange("CALL", self._name, repr({"prompts": prompts, "responses": responses}))
        async with self._turn:
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._call(prompts, responses)
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
        except Exception as error:  # Of the function's own code too, if it gave a generator.
            raise RewardRejected(
                f"the reward function {self._name} gave no list of numbers: {error}", answered
            ) from error
        if len(rewards) != len(items):
            raise RewardRejected(
                f"the reward function {self._name} got {len(items)} texts and gave {len(rewards)} numbers", answered
            )
        if not all(map(math.isfinite, rewards)):
            raise RewardRejected(f"the reward function {self._name} gave a number that is not finite", answered)
        assert self.revision is not None
        return RewardResponse(rewards=rewards, model=self._name, revision=self.revision)

    async def _call(self, prompts: list[str], responses: list[str]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(prompts, responses)
        answer = await _in_a_thread(lambda: self._function(prompts, responses))
        return await answer if inspect.isawaitable(answer) else answer


def _numbers(answer: Any) -> list[float]:
    rewards = list(answer)
    if isinstance(answer, str) or any(isinstance(reward, str) for reward in rewards):
        raise TypeError("it gave text")
    return [float(reward) for reward in rewards]


def load(name: str) -> Callable[[list[str], list[str]], Any]:
    """The function `module:name`; the working directory is searched too. Raises `ConfigError`."""
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.function={name!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"reward.function={name!r} is not a function")
    return function  # type: ignore[no-any-return]


def _revision(function: Callable[..., Any]) -> str:
    """A hash of the file that the function is in, so that a resumed run notices another one."""
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
