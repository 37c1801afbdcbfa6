"""infinity: `POST /classify`, labels by name. Versions up to 0.0.78 return probabilities even for raw scores."""

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


class Infinity(TextsAlone):
    """infinity's classifiers: every label's score for each text, matched by the label's name."""

    name = "infinity"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component)
        self._model = component.model

    async def describe(self, get: Get) -> ModelInfo:
        """The configured classifier, or the server's only one. Raises `UnusableAnswer` if the choice is not unique."""
        answer = from_json(await get("/models"))
        try:
            judges = [model["id"] for model in answer["data"] if "classify" in model["capabilities"]]
        except (KeyError, TypeError) as error:
            raise UnusableAnswer(f"/models lists no models: {answer!r:.200}") from error
        if self._model not in judges and (self._model is not None or len(judges) != 1):
            # With an unknown name, infinity would answer with any of its models.
            raise UnusableAnswer(
                f"choose one of its classifiers with --reward.model: {', '.join(map(str, judges)) or 'it has none'}"
            )
        self._model = self._model or judges[0]
        return model_info(self._model)

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The joined texts, with raw scores requested."""
        return Call("/classify", to_json({"model": self._model, "input": joined(items), "raw_scores": True}))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The score of the requested label for each text. Probabilities raise `UnusableAnswer`."""
        answer = from_json(body)
        texts = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(texts, list):
            raise UnusableAnswer(f"labels with scores for each text were expected, not {answer!r:.80}")
        rewards = [logit_by_name(scores, self._component.label) for scores in texts]
        self._check([[entry["score"] for entry in scores] for scores in texts])
        return response(rewards, self._component.label, info)
