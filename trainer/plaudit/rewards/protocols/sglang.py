"""SGLang's reward models: `POST /classify`, one row of unnamed scores per text."""

from collections.abc import Sequence

from plaudit.rewards.protocols.base import (
    Call,
    Get,
    ProbabilityCheck,
    TextsAlone,
    UnusableAnswer,
    from_json,
    joined,
    logit_by_index,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse


class SGLang(TextsAlone):
    """SGLang's classification models: one row of scores for each text, without label names."""

    name = "sglang"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component, asked=False)

    async def describe(self, get: Get) -> ModelInfo:
        """The model's path and its weight version, once the server is healthy."""
        await get("/health")
        info = from_json(await get("/get_model_info"))
        if not isinstance(info, dict) or not isinstance(info.get("model_path"), str):
            raise UnusableAnswer(f"/get_model_info tells of no model: {info!r:.200}")
        # The version increases when the running server's weights are replaced.
        version = info.get("weight_version")
        return model_info(info["model_path"], revision=f"{info['model_path']}@{version}" if version else None)

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The joined texts."""
        return Call("/classify", to_json({"text": joined(items)}))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """One logit from each text's row."""
        answers = from_json(body)
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise UnusableAnswer(f"a list of objects was expected, not {answers!r:.80}")
        rows = [answer.get("embedding") for answer in answers]
        rewards = [logit_by_index(row, self._component) for row in rows]
        self._check([row or [] for row in rows])
        return response(rewards, self._component.label, info)
