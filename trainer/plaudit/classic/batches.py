"""The lists that a program gives to `step`, checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def checked_scores(
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    scores: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    batch_size: int,
) -> Tensor:
    """The scores as [B] in fp32, once everything has been found to be as many and of the right shapes.

    Raises:
        ValueError: a list has another length than `batch_size`, a score is not one number, or a mask doesn't fit its
            response.
    """
    lists: dict[str, Sequence[Any]] = {"queries": queries, "responses": responses, "scores": scores}
    for name, entries in (lists if masks is None else {**lists, "response_masks": masks}).items():
        if len(entries) != batch_size:
            raise ValueError(f"{len(entries)} {name} in a step with batch_size={batch_size}")
    numbers = [torch.as_tensor(score, dtype=torch.float32).detach().cpu() for score in scores]
    for i, number in enumerate(numbers):
        if number.numel() != 1:
            raise ValueError(f"score {i} has the shape {tuple(number.shape)}: give one number a sample")
    for i, (response, mask) in enumerate(zip(responses, masks or [], strict=False)):
        if mask.shape != response.shape or not bool(mask.any()):
            raise ValueError(
                f"response_masks[{i}] has the shape {tuple(mask.shape)} and {int(mask.sum())} ones, for "
                f"{len(response)} response tokens: as many, and at least one must be 1"
            )
    return torch.stack([number.reshape(()) for number in numbers])
