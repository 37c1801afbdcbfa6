"""slime's remote reward: POST prompt, response and label to the URL; the answer is a number. One sample per request."""

from collections.abc import Sequence

from plaudit.rewards.protocols.base import (
    Call,
    Get,
    TextsAlone,
    UnusableAnswer,
    from_json,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse


class Slime(TextsAlone):
    """A custom reward server in slime's format: one sample a request, one number as the answer."""

    name = "slime"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component

    async def describe(self, get: Get) -> ModelInfo:
        """Only the configured model name: the server has no other route. Raises `UnusableAnswer` for a label."""
        if self._component.label is not None:
            raise UnusableAnswer(
                f"this protocol has no labels to choose from, so {self._component.label!r} can't be asked for: take "
                "what the server's reward is with --reward.label None"
            )
        # The server has only the scoring route.
        return model_info(self._component.model or "slime", max_items=1)

    def no_conversations(self, info: ModelInfo) -> str | None:
        """None: the prompt may be a list of messages."""
        return None

    def takes(self, info: ModelInfo) -> Sequence[str]:
        """The column that is sent as the row's label."""
        return (self._component.label_field,)

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """Prompt, response and label of exactly one item; a row without a label sends null."""
        [item] = items
        prompt = item.prompt if isinstance(item.prompt, str) else [message.model_dump() for message in item.prompt]
        label = item.fields.get(self._component.label_field)
        return Call("", to_json({"prompt": prompt, "response": item.response, "label": label}))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The number in the answer's body."""
        return response([from_json(body)], None, info)
