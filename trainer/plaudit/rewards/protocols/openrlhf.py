"""OpenRLHF's reward server: `POST /get_reward`. There are no labels to choose from; the server defines the reward."""

from collections.abc import Sequence

from plaudit.rewards.protocols.base import (
    Call,
    Get,
    TextsAlone,
    UnusableAnswer,
    from_json,
    joined,
    model_info,
    prompt_text,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse


class OpenRLHF(TextsAlone):
    """OpenRLHF's reward server: joined texts, prompts and labels; one reward for each text."""

    name = "openrlhf"
    retried_statuses: frozenset[int] = frozenset()
    adds_first_token = False

    def __init__(self, component: RewardComponent) -> None:
        self._component = component

    async def describe(self, get: Get) -> ModelInfo:
        """Only the configured model name: the server doesn't describe itself. Raises `UnusableAnswer` for a label."""
        if self._component.label is not None:
            raise UnusableAnswer(
                f"this protocol has no labels, so {self._component.label!r} can't be asked for: take what the server's "
                "reward is with --reward.label None"
            )
        # The server has no route for its health or model.
        return model_info(self._component.model or "openrlhf")

    def takes(self, info: ModelInfo) -> Sequence[str]:
        """The column that is sent as the row's label."""
        return (self._component.label_field,)

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """Texts, prompts and labels; a row without a label sends an empty string."""
        prompts = [prompt_text(item) for item in items]
        labels = [item.fields.get(self._component.label_field, "") for item in items]
        body = {"query": joined(items), "prompts": prompts, "labels": labels}
        return Call("/get_reward", to_json(body))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The list `rewards`, in request order."""
        answer = from_json(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise UnusableAnswer(f'{{"rewards": [...]}} was expected, not {answer!r:.80}')
        return response(answer["rewards"], None, info)
