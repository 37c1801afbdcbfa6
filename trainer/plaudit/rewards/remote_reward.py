"""The reward service for TRL's own trainers: `RLOOTrainer(model, RemoteReward("http://127.0.0.1:8000"), ...)`."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from plaudit.rewards.client import RewardClient
from plaudit.rewards.errors import RewardRejected
from plaudit.rewards.settings import RewardSettings

Text = str | list[dict[str, Any]]
"""What TRL hands over: a text, or the messages of a conversation."""


def contents(messages: list[dict[str, Any]]) -> str:
    """The contents of the messages, one below the other. Raises `RewardRejected` for what is no text."""
    return "\n".join(_text_of(message.get("content")) for message in messages)


def _text_of(content: object) -> str:
    """A message's text, which may come in parts: `[{"type": "text", "text": ...}, ...]`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RewardRejected(
            f"a message's content is {content!r:.80}, and only text can be judged: give RemoteReward a `render` that "
            "makes text of a conversation"
        )
    return "".join(map(str, texts))


class RemoteReward:
    """An async callable with the signature of TRL's `reward_funcs`; a failed reward is an exception, never None.

    `reward` is a URL or whole settings. Conversations become text by `render`. The client connects at the first call
    and serves until `close`.
    """

    def __init__(
        self, reward: str | RewardSettings, *, render: Callable[[list[dict[str, Any]]], str] = contents
    ) -> None:
        self._settings = RewardSettings.of(url=(reward,)) if isinstance(reward, str) else reward
        self._render = render
        self._client: RewardClient | None = None
        self._opening = asyncio.Lock()
        self.__name__ = self._settings.components[0].name if self._settings.components else "reward"

    async def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: object) -> list[float]:
        """One reward for each completion, in order. Raises `RewardError`."""
        async with self._opening:
            if self._client is None:
                client = RewardClient(self._settings)
                try:
                    await asyncio.to_thread(client.connect)
                except BaseException:
                    client.close()
                    raise
                self._client = client
        future = self._client.submit([self._text(p) for p in prompts], [self._text(c) for c in completions])
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the client's thread and connections."""
        if self._client is not None:
            self._client.close()

    def _text(self, value: Text) -> str:
        return value if isinstance(value, str) else self._render(value)
