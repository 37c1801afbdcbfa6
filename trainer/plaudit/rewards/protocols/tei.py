"""Hugging Face text-embeddings-inference: `POST /predict` with `raw_scores`, labels by name."""

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


class TEI(TextsAlone):
    """text-embeddings-inference's classifiers: every label's score for each text, matched by the label's name."""

    name = "tei"
    retried_statuses = frozenset({424})
    """`Backend`: the forward pass failed."""

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component)

    async def describe(self, get: Get) -> ModelInfo:
        """Model, revision, labels and batch limit from `/info`. Raises `UnusableAnswer` if it serves no classifier."""
        await get("/health")
        info = from_json(await get("/info"))
        try:
            kind = info["model_type"]
            about = kind.get("classifier") or kind["reranker"]
            labels = [about["id2label"][index] for index in sorted(about["id2label"], key=int)]
            return model_info(
                info["model_id"], revision=info["model_sha"], labels=labels, max_items=info["max_client_batch_size"]
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnusableAnswer(f"/info tells of no classifier: {info!r:.200}") from error

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The joined texts, with raw scores requested and truncation on."""
        # A flat list of two texts would be read as one pair, so each text is wrapped in a list.
        inputs = [[text] for text in joined(items)]
        return Call("/predict", to_json({"inputs": inputs, "raw_scores": True, "truncate": True}))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """The score of the requested label for each text. Probabilities raise `UnusableAnswer`."""
        answers = from_json(body)
        if not isinstance(answers, list):
            raise UnusableAnswer(f"a list was expected, not {answers!r:.80}")
        label = self._component.label
        rewards = [logit_by_name(scores, label) for scores in answers]
        self._check([[entry["score"] for entry in scores] for scores in answers])
        return response(rewards, label, info)
