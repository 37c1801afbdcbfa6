"""The clipped objectives of PPO (Schulman et al. 2017, arXiv 1707.06347), one number a token.

All tensors are [B, T], or all [N]; so is what comes out. The caller takes the mean over real tokens, so that a
mini-batch may span processes. Every function raises `ValueError` for tensors of different shapes.
"""

import torch
from torch import Tensor

from plaudit.ppo.shapes import require_same_shape


def policy_losses(ratios: Tensor, advantages: Tensor, *, cliprange: float) -> Tensor:
    """max(-A * ratio, -A * clamp(ratio, 1 - c, 1 + c)) with ratio = p / p_old of the token."""
    require_same_shape(ratios=ratios, advantages=advantages)
    clipped = ratios.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(-advantages * ratios, -advantages * clipped)


def policy_clipped(ratios: Tensor, advantages: Tensor, *, cliprange: float) -> Tensor:
    """True where the clip decides the policy loss: the token's gradient is zero there."""
    require_same_shape(ratios=ratios, advantages=advantages)
    return -advantages * ratios.clamp(1.0 - cliprange, 1.0 + cliprange) > -advantages * ratios


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
