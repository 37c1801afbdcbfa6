"""vLLM's pooling servers: `POST /classify` and `POST /pooling`, both asked for raw logits.

Neither returns the order of the labels, so a model with several labels needs `label_index`. `/classify` names the
winning label of each text, which is used to check the index.
"""

from collections.abc import Sequence
from typing import Any

from plaudit.rewards.protocols.base import (
    Call,
    Get,
    ProbabilityCheck,
    TextsAlone,
    UnusableAnswer,
    from_json,
    in_index_order,
    joined,
    logit_by_index,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse


class _VLLM(TextsAlone):
    retried_statuses: frozenset[int] = frozenset()
    conversations_per_request = 1

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component)
        self._model = component.model

    async def describe(self, get: Get) -> ModelInfo:
        await get("/health")
        if self._model is None:
            models = from_json(await get("/v1/models"))
            try:
                self._model = str(models["data"][0]["id"])
            except (KeyError, TypeError, IndexError) as error:
                raise UnusableAnswer(f"/v1/models lists no model: {models!r:.80}") from error
        return model_info(self._model)

    def no_conversations(self, info: ModelInfo) -> str | None:
        return None

    def _input(self, items: Sequence[RewardItem]) -> dict[str, Any]:
        """Texts, or a single conversation, which the server renders."""
        if all(isinstance(item.prompt, str) for item in items):
            return {"input": joined(items)}
        [item] = items
        messages = [message.model_dump() for message in item.prompt if not isinstance(message, str)]
        answer = {"role": "assistant", "content": item.response}
        return {"messages": [*messages, answer], "add_generation_prompt": False}

    def _entries(self, body: bytes) -> list[dict[str, Any]]:
        answer = from_json(body)
        return in_index_order(answer.get("data") if isinstance(answer, dict) else answer)


class VLLMClassify(_VLLM):
    """vLLM's `/classify`: one row of logits and the winning label's name for each text."""

    name = "vllm-classify"

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """Texts, or one conversation, with the activation function turned off."""
        # `activation` is the older name of `use_activation`; either version ignores the other's.
        body = {"model": self._model, **self._input(items), "use_activation": False, "activation": False}
        return Call("/classify", to_json(body))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """One logit from each row.

        Raises `UnusableAnswer` if the winning label's name contradicts `label_index`.
        """
        entries = self._entries(body)
        rows = [entry.get("probs") for entry in entries]
        rewards = [logit_by_index(row, self._component) for row in rows]
        for entry, row, reward in zip(entries, rows, rewards, strict=True):
            if row and len(row) > 1 and reward == max(row):
                self._check_label(entry.get("label"))
        self._check([row or [] for row in rows])
        return response(rewards, self._component.label, info)

    def _check_label(self, winner: object) -> None:
        label, index = self._component.label, self._component.label_index
        if label is not None and winner is not None and winner != label:
            raise UnusableAnswer(f"label {label!r} was asked for, but reward.label_index={index} is {winner!r}")


class VLLMPooling(_VLLM):
    """vLLM's `/pooling` with the task `classify`: one row of logits for each text."""

    name = "vllm-pooling"

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """Texts, or one conversation, with the activation function turned off."""
        body = {
            "model": self._model,
            **self._input(items),
            "task": "classify",
            "encoding_format": "float",
            "use_activation": False,
        }
        return Call("/pooling", to_json(body))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """One logit from each row."""
        rows = [entry.get("data") for entry in self._entries(body)]
        rewards = [logit_by_index(row, self._component) for row in rows]
        self._check([row or [] for row in rows])
        return response(rewards, self._component.label, info)
