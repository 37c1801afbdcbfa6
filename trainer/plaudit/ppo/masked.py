"""Statistics over real tokens only. `mask` is True on real tokens; other entries never matter.

`values` and `mask` have one shape, [B, T] or [N]. Sums, means and variances are of shape [], or [B] along `dim=1`.

Failure modes: a mean that counts padding; padding that is not 0 after whitening and leaks into GAE.
"""

import torch
from torch import Tensor

from plaudit.ppo.shapes import require_same_shape

EPSILON = 1e-8
"""Added to the variance before its square root, as the classic trainer does."""


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the real entries; over everything, or along `dim`. Raises `ValueError` for different shapes."""
    require_same_shape(values=values, mask=mask)
    real = values.masked_fill(~mask, 0.0)
    return real.sum() if dim is None else real.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """M(x) = sum(x * mask) / sum(mask); over everything, or along `dim`. An empty mask gives 0.

    Raises `ValueError` for different shapes.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the real entries (divisor n - 1). A single entry varies by 0.

    Raises `ValueError` for different shapes.
    """
    squares = (values - masked_mean(values, mask)).square()
    return masked_sum(squares, mask) / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """W(x) = (x - mean) / sqrt(var + 1e-8): mean 0 and variance 1 over the real entries, 0 elsewhere.

    Gives the shape of `values`. Raises `ValueError` for different shapes.
    """
    centred = values - masked_mean(values, mask)
    return (centred * torch.rsqrt(masked_var(values, mask) + EPSILON)).masked_fill(~mask, 0.0)


def scale(values: Tensor, mask: Tensor) -> Tensor:
    """Like `whiten`, but the mean stays what it was: W(x) + mean, 0 outside the mask.

    Gives the shape of `values`. Raises `ValueError` for different shapes.
    """
    return (whiten(values, mask) + masked_mean(values, mask)).masked_fill(~mask, 0.0)
