"""Plaudit's own protocol (`plaudit.wire`): raw logits by label name, with the model's revision in every answer."""

from collections.abc import Sequence
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from plaudit.rewards.protocols.base import BrokenBody, Call, Get, TextsAlone, UnusableAnswer
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import MODEL_PATH, READYZ_PATH, REWARDS_PATH, ModelInfo, RewardItem, RewardRequest, RewardResponse

Message = TypeVar("Message", bound=BaseModel)


class Plaudit(TextsAlone):
    """Plaudit's reward service. It takes conversations and fields if its description says so."""

    name = "plaudit"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component

    async def describe(self, get: Get) -> ModelInfo:
        """The service's own description, once `/readyz` reports that it is ready."""
        await get(READYZ_PATH)
        return _parse(ModelInfo, await get(MODEL_PATH))

    def no_conversations(self, info: ModelInfo) -> str | None:
        """Why this service takes only texts, or None: it needs wire version 2 and `--join chat`."""
        if info.wire < 2:
            return "it is a reward service from before conversations; update it"
        return None if info.join == "chat" else f"it was started with --join {info.join}; start it with --join chat"

    def needs(self, info: ModelInfo) -> Sequence[str]:
        """The fields in the service's description."""
        return info.fields

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The items and the label; fields at their default are left out."""
        request = RewardRequest(items=list(items), label=self._component.label)
        # Older services refuse `fields`; items contain fields only if the service asks for them.
        return Call(REWARDS_PATH, request.model_dump_json(exclude_defaults=True).encode())

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The answer, validated against the wire's model."""
        return _parse(RewardResponse, body)


def _parse(model: type[Message], body: bytes) -> Message:
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise BrokenBody(first["msg"]) from error
        where = ".".join(str(part) for part in first["loc"])
        raise UnusableAnswer(f"{where}: {first['msg']} (got {first['input']!r:.80})") from error
