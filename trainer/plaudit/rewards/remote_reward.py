"""Rewards for TRL's trainers: `RLOOTrainer(model, RemoteReward("http://127.0.0.1:8000"), ...)`."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plaudit.rewards.client import RewardClient
from plaudit.rewards.errors import RewardRejected
from plaudit.rewards.rows import Prompt, text_of
from plaudit.rewards.settings import RewardSettings

Text = str | list[dict[str, Any]]
"""What TRL passes: a text, or the messages of a conversation."""


def contents(messages: list[dict[str, Any]]) -> str:
    """The contents of the messages, joined by line breaks. Raises `RewardRejected` for content that is not text."""
    return "\n".join(text_of(message.get("content")) for message in messages)


class RemoteReward:
    """An async callable with the signature of TRL's `reward_funcs`; a failed reward is an exception, never None.

    `reward` is a URL or complete settings. Conversations are passed on unchanged to a reward that accepts them, unless
    `render` converts them to texts. A reward receives the columns that it asks for. The client connects at the first
    call and stays connected until `close`.
    """

    def __init__(
        self, reward: str | RewardSettings, *, render: Callable[[list[dict[str, Any]]], str] | None = None
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
        pairs = [self._pair(p, c) for p, c in zip(prompts, completions, strict=True)]
        future = self._client.submit(
            [prompt for prompt, _ in pairs], [response for _, response in pairs], _of_rows(columns, len(pairs))
        )
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            self._client.close()

    def _pair(self, prompt: Text, completion: Text) -> tuple[Prompt, str]:
        """Prompt and response. The response is the completion's last message; earlier ones join the prompt."""
        if self._render is not None:
            return tuple(text if isinstance(text, str) else self._render(text) for text in (prompt, completion))  # type: ignore[return-value]
        if isinstance(completion, str):
            return prompt, completion
        if not completion or completion[-1].get("role") != "assistant":
            raise RewardRejected(
                f"a completion must end with the assistant's message, and this one is {completion!r:.200}"
            )
        *before, last = completion
        if before:
            begun = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = [*begun, *before]
        return prompt, text_of(last.get("content"))


def _of_rows(columns: Mapping[str, object], count: int) -> dict[str, Sequence[Any]]:
    """The keyword arguments that are columns; TRL also passes its own state."""
    return {
        name: column
        for name, column in columns.items()
        if isinstance(column, Sequence) and not isinstance(column, str | bytes) and len(column) == count
    }
