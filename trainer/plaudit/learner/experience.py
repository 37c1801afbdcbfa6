"""From a rollout to what an update learns from: token rewards, advantages and returns.

Failure mode: an advantage computed from other samples, or another KL coefficient, than those of the rollout.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit.policy.samples import Rollout
from plaudit.ppo import group_advantages, kl, rewards
from plaudit.ppo.advantages import gae, length_adaptive_lambda
from plaudit.ppo.masked import masked_sum, scale, whiten
from plaudit.settings.ppo import PPOHyperparameters


@dataclass(frozen=True)
class Experience:
    """A rollout with its token rewards and advantages. All tensors are [B, T] by response token but `scores` [B]."""

    rollout: Rollout
    scores: Tensor
    """As used: after scaling, normalising and clipping."""
    kls: Tensor
    """Estimated KL from the reference at each token, in nats."""
    non_score_rewards: Tensor
    """The KL penalty alone."""
    rewards: Tensor
    """KL penalty at every token, and the score at the last one; before whitening."""
    advantages: Tensor
    """Whitened over the batch if they come from GAE."""
    returns: Tensor
    """What the value head learns; 0 without one."""


def make_experience(rollout: Rollout, scores: Tensor, config: PPOHyperparameters, *, kl_coef: float) -> Experience:
    """Token rewards (`ppo.rewards.token_rewards`), then advantages (`ppo.advantages.gae`, or `ppo.group_advantages`).

    `scores` [B] take the place of the rollout's own. The responses to one prompt are consecutive rows.
    """
    mask, kls = rollout.samples.mask, rollout.full_kl
    if kls is None:
        kls = kl.ESTIMATORS[config.kl_penalty](rollout.logprobs, rollout.ref_logprobs)
    token_rewards, non_score = rewards.token_rewards(scores, kls, mask, kl_coef=kl_coef)
    if config.critic_free:
        advantages, returns = _of_groups(token_rewards, mask, config), torch.zeros_like(token_rewards)
    else:
        earned = scale(token_rewards, mask) if config.whiten_rewards else token_rewards
        advantages, returns = _advantages_and_returns(earned, rollout, config)
        advantages = whiten(advantages, mask)
    return Experience(
        rollout=rollout,
        scores=scores,
        kls=kls,
        non_score_rewards=non_score,
        rewards=token_rewards,
        advantages=advantages,
        returns=returns,
    )


def _of_groups(token_rewards: Tensor, mask: Tensor, config: PPOHyperparameters) -> Tensor:
    """The advantage of each response, KL penalty included, at each of its tokens: [B, T]."""
    of_responses = masked_sum(token_rewards, mask, dim=1)
    estimate = group_advantages.ESTIMATORS[config.advantage_estimator]
    advantages = estimate(of_responses.view(-1, config.responses_per_prompt)).flatten()
    return advantages.unsqueeze(1).expand_as(mask).masked_fill(~mask, 0.0)


def _advantages_and_returns(earned: Tensor, rollout: Rollout, config: PPOHyperparameters) -> tuple[Tensor, Tensor]:
    """Advantages with the policy's lambda and returns with the value head's, both [B, T]."""
    mask = rollout.samples.mask
    lam: float | Tensor = config.lam
    if config.lam_alpha is not None:
        lam = length_adaptive_lambda(rollout.samples.response_lengths, alpha=config.lam_alpha)
    advantages, returns = gae(earned, rollout.values, mask, gamma=config.gamma, lam=lam)
    if config.value_lam is not None or config.lam_alpha is not None:
        value_lam = config.lam if config.value_lam is None else config.value_lam
        _, returns = gae(earned, rollout.values, mask, gamma=config.gamma, lam=value_lam)
    return advantages, returns
