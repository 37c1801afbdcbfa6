"""The Open Inference Protocol (KServe v2, Triton): `POST /v2/models/NAME/infer` with a BYTES tensor of texts.

Tensors don't name labels, so a model with several labels needs `label_index`.
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
    joined,
    logit_by_index,
    model_info,
    response,
    to_json,
)
from plaudit.rewards.settings import RewardComponent
from plaudit.wire import ModelInfo, RewardItem, RewardResponse


class KServe(TextsAlone):
    """A model that takes one BYTES tensor of texts and returns floating-point logits."""

    name = "kserve"
    retried_statuses: frozenset[int] = frozenset()

    def __init__(self, component: RewardComponent) -> None:
        self._component = component
        self._check = ProbabilityCheck(component, asked=False)
        self._input: dict[str, Any] = {}
        self._output = ""

    async def describe(self, get: Get) -> ModelInfo:
        """Reads the names of the input and output tensors. Raises `UnusableAnswer` for a model without them."""
        model = self._component.model
        if model is None:
            raise UnusableAnswer("a KServe server may have several models: say which one with --reward.model")
        await get(f"/v2/models/{model}/ready")
        about = from_json(await get(f"/v2/models/{model}"))
        try:
            self._input = next(tensor for tensor in about["inputs"] if tensor["datatype"] == "BYTES")
            outputs = [tensor["name"] for tensor in about["outputs"] if tensor["datatype"].startswith("FP")]
            self._output = "logits" if "logits" in outputs else outputs[0]
            versions = about.get("versions") or [""]
        except (KeyError, TypeError, IndexError, StopIteration) as error:
            raise UnusableAnswer(f"model {model} takes no texts (BYTES) or gives no numbers: {about!r:.200}") from error
        return model_info(model, revision=f"{model}@{versions[-1]}" if versions[-1] else None)

    def encode(self, items: Sequence[RewardItem]) -> Call:
        """The joined texts as one tensor [B], or [B, 1, …] if the model's input has more dimensions."""
        texts = joined(items)
        shape = [len(texts), *([1] * (len(self._input["shape"]) - 1))]
        tensor = {"name": self._input["name"], "shape": shape, "datatype": "BYTES", "data": texts}
        body = {"inputs": [tensor], "outputs": [{"name": self._output}]}
        return Call(f"/v2/models/{self._component.model}/infer", to_json(body))

    def decode(self, body: bytes, info: ModelInfo) -> RewardResponse:
        """One logit from each row of the output tensor [B, labels]."""
        answer = from_json(body)
        try:
            tensor = next(tensor for tensor in answer["outputs"] if tensor["name"] == self._output)
            data, shape = tensor["data"], tensor["shape"]
            width = len(data) // shape[0]
            if width * shape[0] != len(data):
                raise UnusableAnswer(f"{len(data)} numbers came back for the shape {shape}")
            rows = [data[start : start + width] for start in range(0, len(data), width)]
        except (KeyError, TypeError, IndexError, StopIteration, ZeroDivisionError) as error:
            raise UnusableAnswer(f"no tensor {self._output!r} came back: {answer!r:.200}") from error
        rewards = [logit_by_index(row, self._component) for row in rows]
        self._check(rows)
        return response(rewards, self._component.label, info)
