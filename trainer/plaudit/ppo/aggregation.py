"""From one loss a token to the loss of a mini-batch.

| aggregation | loss of B responses of R_1, ..., R_B tokens | used by |
| --- | --- | --- |
| `token_mean` | sum over all tokens / sum of R_b | the classic trainer, DAPO (arXiv 2503.14476) |
| `sequence_mean` | mean over responses of their mean over R_b tokens | GRPO (arXiv 2402.03300) |
| `sequence_sum` | mean over responses of their sum / a constant number of tokens | Dr. GRPO (arXiv 2503.20783) |

A mini-batch is computed in groups of rows, in several processes. Each group's part is a sum over its own rows divided
by the `divisor` of the whole mini-batch, so that the parts add up to the loss of the whole.

Failure mode: a mean over a group's own tokens, which would make the loss depend on how the mini-batch is split.
"""

from typing import Literal

from torch import Tensor

from plaudit.ppo.masked import masked_mean, masked_sum
from plaudit.ppo.shapes import require_rank

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


def group_sum(losses: Tensor, mask: Tensor, *, aggregation: Aggregation, tokens: float | None = None) -> Tensor:
    """The numerator of a group's part, []. `losses` and `mask` [b, T]; [N] too with `token_mean`.

    `tokens` is the constant of `sequence_sum`. Raises `ValueError` for different shapes, or if the constant is missing.
    """
    if aggregation == "token_mean":
        return masked_sum(losses, mask)
    require_rank(2, mask=mask)
    if aggregation == "sequence_mean":
        return masked_mean(losses, mask, dim=1).sum()
    if tokens is None:
        raise ValueError("sequence_sum needs the number of tokens to divide each response's sum by")
    return masked_sum(losses, mask) / tokens


def divisor(mask: Tensor, *, aggregation: Aggregation) -> Tensor | int:
    """What the parts of a mini-batch with this mask [B, T] are divided by: its tokens, or its responses."""
    return mask.sum() if aggregation == "token_mean" else len(mask)


def aggregate(losses: Tensor, mask: Tensor, *, aggregation: Aggregation, tokens: float | None = None) -> Tensor:
    """The loss of a whole mini-batch, []. Arguments and errors as for `group_sum`."""
    if aggregation == "token_mean":
        return masked_mean(losses, mask)
    return group_sum(losses, mask, aggregation=aggregation, tokens=tokens) / divisor(mask, aggregation=aggregation)
