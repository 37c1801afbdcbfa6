"""Hugging Face Inference Endpoints (text classification): `POST` to the URL itself, labels by name."""

from collections.abc import Sequence

from plaudit.rewards.protocols.base import (
    Call,
    Get,
    ProbabilityCheck,
    TextsAlone,
    UnusableAnswer,
    from_json,
    joined,
    logit_by_name,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse

ALL_LABELS = 1000


class HFInference(TextsAlone):
    """Inference Endpoints: every label's raw score for each text, matched by the label's name."""

    name = "hf-inference"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component)

    async def describe(self, get: Get) -> ModelInfo:
        """Only the configured model name: an endpoint does not describe its model."""
        # Endpoints don't describe their model. While scaling up from zero they answer 503.
        return model_info(self._component.model or "hf-inference")

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The joined texts, with the activation function turned off."""
        parameters = {"function_to_apply": "none", "top_k": ALL_LABELS, "truncation": True}
        return Call("", to_json({"inputs": joined(items), "parameters": parameters}))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The score of the requested label for each text. Probabilities raise `UnusableAnswer`."""
        answers = from_json(body)
        if not isinstance(answers, list) or not all(isinstance(scores, list) for scores in answers):
            raise UnusableAnswer(
                f"every label's score for each text was asked for; the answer is not a list of lists: {answers!r:.80}"
            )
        label = self._component.label
        rewards = [logit_by_name(scores, label) for scores in answers]
        self._check([[entry["score"] for entry in scores] for scores in answers])
        return response(rewards, label, info)
