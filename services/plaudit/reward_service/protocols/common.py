"""What the adapters share: reading a JSON body, and the usual activations."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError

from plaudit.reward_service.engine.batching import Logits
from plaudit.reward_service.http.body import parse_json, read_body
from plaudit.reward_service.http.service import Service, ServiceLimits, too_many
from plaudit.reward_service.problems import ProblemError

ModelT = TypeVar("ModelT", bound=BaseModel)


class Foreign(BaseModel):
    """A body of another server's protocol. Unknown members are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


async def read_json(service: Service, request: Request) -> dict[str, Any]:
    """The JSON object in the body, or `ProblemError`."""
    value = await parse_json(await read_body(service, request))
    if not isinstance(value, dict):
        raise ProblemError("invalid-request", "the body is not a JSON object")
    refuse_long_lists(value.values(), service.limits)
    return value


def refuse_long_lists(values: Iterable[object], limits: ServiceLimits) -> None:
    """Refuse lists that are too long before validation, which would build an error for each member."""
    for value in values:
        if isinstance(value, list) and len(value) > limits.max_items:
            raise too_many(len(value), limits)


def parsed(model: type[ModelT], value: dict[str, Any]) -> ModelT:
    """`value` as `model`, or `ProblemError` with the first error."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise ProblemError("invalid-request", f"{path}: {first['msg']}") from None


def activated(logits: Logits) -> list[float]:
    """Probabilities: the softmax, or the sigmoid of a single logit."""
    if len(logits) == 1:
        return [_sigmoid(logits[0])]
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def ranked(labels: Sequence[str], scores: Sequence[float]) -> list[dict[str, Any]]:
    """`{"label", "score"}` for each label, best first."""
    pairs = sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "score": score} for label, score in pairs]


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit))
