"""The clipped objectives of PPO (Schulman et al. 2017, arXiv 1707.06347), one number a token.

All tensors are [B, T], or all [N]; so is what comes out. The caller aggregates them over real tokens
(`ppo.aggregation`), so that a mini-batch may span processes. Every function raises `ValueError` for tensors of
different shapes.
"""

import torch
from torch import Tensor

from plaudit.ppo.shapes import require_same_shape


def policy_losses(
    ratios: Tensor, advantages: Tensor, *, cliprange: float, upper: float | None = None, dual_clip: float | None = None
) -> Tensor:
    """max(-A * ratio, -A * clamp(ratio, 1 - c, 1 + u)) with ratio = p / p_old of the token; u is c unless given.

    `upper` > `cliprange` is "clip-higher" of DAPO (Yu et al. 2025, arXiv 2503.14476): unlikely tokens may gain more.
    `dual_clip` d > 1 bounds the loss by -A * d where A < 0 (Ye et al. 2020, arXiv 1912.09729), so that a token that
    has become much likelier does not decide the step.
    """
    require_same_shape(ratios=ratios, advantages=advantages)
    unbounded = torch.maximum(-advantages * ratios, -advantages * _clip(ratios, cliprange, upper))
    if dual_clip is None:
        return unbounded
    return torch.where(advantages < 0, torch.minimum(unbounded, -advantages * dual_clip), unbounded)


def policy_clipped(
    ratios: Tensor, advantages: Tensor, *, cliprange: float, upper: float | None = None, dual_clip: float | None = None
) -> Tensor:
    """True where a clip decides the policy loss: the token's gradient is zero there."""
    require_same_shape(ratios=ratios, advantages=advantages)
    clipped = -advantages * _clip(ratios, cliprange, upper) > -advantages * ratios
    return clipped if dual_clip is None else clipped | ((advantages < 0) & (ratios > dual_clip))


def _clip(ratios: Tensor, cliprange: float, upper: float | None) -> Tensor:
    return ratios.clamp(1.0 - cliprange, 1.0 + (cliprange if upper is None else upper))


def clip_values(values: Tensor, old_values: Tensor, *, cliprange: float) -> Tensor:
    """Values held within `cliprange` of those that the rollout had."""
    require_same_shape(values=values, old_values=old_values)
    return values.clamp(old_values - cliprange, old_values + cliprange)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float) -> Tensor:
    """0.5 * max((v - ret)^2, (clip(v, v_old +- c) - ret)^2)."""
    require_same_shape(values=values, returns=returns)
    clipped = clip_values(values, old_values, cliprange=cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float) -> Tensor:
    """True where the clip decides the value loss."""
    require_same_shape(values=values, returns=returns)
    clipped = clip_values(values, old_values, cliprange=cliprange)
    return (clipped - returns).square() > (values - returns).square()
