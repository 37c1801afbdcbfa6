"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438)."""

import torch
from torch import Tensor

from plaudit.ppo.shapes import require_one_a_row, require_rank, require_same_shape


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token, both [B, T] and 0 outside the mask.

    delta_t = r_t + gamma * v_{t+1} - v_t
    A_t     = delta_t + gamma * lam * A_{t+1}
    returns = A + v

    `values[t]` is the value of the state *before* token t. Responses end: nothing is bootstrapped past the last real
    token. Advantages are not whitened here.

    Args:
        rewards: [B, T].
        values: [B, T].
        mask: [B, T] bool, True on real tokens.
        lam: one number, or [B] with one for each row.

    Raises:
        ValueError: the shapes differ.
    """
    require_rank(2, rewards=rewards)
    if isinstance(lam, Tensor):
        require_one_a_row(rewards, "rewards", lam=lam)
    require_same_shape(rewards=rewards, values=values, mask=mask)
    rewards = rewards.masked_fill(~mask, 0.0)
    values = values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages, advantages + values


def length_adaptive_lambda(lengths: Tensor, *, alpha: float) -> Tensor:
    """lambda = 1 - 1 / (alpha * R) of responses with R tokens, at least 0: [B] -> [B] (VAPO, arXiv 2504.05118).

    1 / (1 - lambda), the number of tokens over which GAE looks ahead, is then alpha * R: the same share of every
    response. `lengths` [B] counts response tokens.
    """
    return (1.0 - 1.0 / (alpha * lengths.clamp(min=1).to(torch.float32))).clamp(min=0.0)
