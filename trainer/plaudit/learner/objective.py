"""What a mini-batch's update minimises: the clipped losses of each token.

Everything here is computed on the device from tensors of one shape, [b, T] or [N]; nothing is read on the host.
"""

from typing import Any, Protocol

from torch import Tensor

from plaudit.policy.model import ResponseOutputs
from plaudit.ppo import kl, losses
from plaudit.settings.ppo import PPOHyperparameters


class RolloutTokens(Protocol):
    """A mini-batch's tokens as they were in the rollout. All of one shape; `mask` is True on real tokens."""

    @property
    def mask(self) -> Tensor:
        """bool, True on real tokens."""

    @property
    def logprobs(self) -> Tensor:
        """Under the policy that sampled."""

    @property
    def values(self) -> Tensor:
        """Of the state before each token, as the value head then estimated them."""

    @property
    def advantages(self) -> Tensor:
        """Whitened over the batch."""

    @property
    def returns(self) -> Tensor:
        """What the value head learns."""


def token_losses(
    old: RolloutTokens, new: ResponseOutputs, config: PPOHyperparameters, ref_logprobs: Tensor | None = None
) -> Tensor:
    """policy + vf_coef * value - entropy_coef * entropy + kl_loss_coef * kl, for each token: [b, T] or [N].

    `ref_logprobs` are needed for a KL term alone.
    """
    policy, value = clipped_losses(old, new, config)
    total = policy + config.vf_coef * value
    if config.entropy_coef != 0:
        total = total - config.entropy_coef * new.entropy
    return total if config.kl_loss_coef == 0 else total + config.kl_loss_coef * kl_terms(old, new, config, ref_logprobs)


def kl_terms(
    old: RolloutTokens, new: ResponseOutputs, config: PPOHyperparameters, ref_logprobs: Tensor | None
) -> Tensor:
    """The KL term of each token (`ppo.kl.loss_terms`)."""
    assert ref_logprobs is not None
    return kl.loss_terms(
        new.logprobs, old.logprobs, ref_logprobs, estimator=config.kl_loss, weighted=config.kl_loss_weighted
    )


def clipped_losses(old: RolloutTokens, new: ResponseOutputs, config: PPOHyperparameters) -> tuple[Tensor, Tensor]:
    """Policy and value losses of each token (`ppo.losses`)."""
    ratios = (new.logprobs - old.logprobs).exp()
    return (
        losses.policy_losses(ratios, old.advantages, **policy_clips(config)),
        losses.value_losses(new.values, old.values, old.returns, cliprange=config.cliprange_value),
    )


def policy_clips(config: PPOHyperparameters) -> dict[str, Any]:
    """The bounds of the policy's ratio, as `ppo.losses` names them."""
    return {"cliprange": config.cliprange, "upper": config.cliprange_upper, "dual_clip": config.dual_clip}


def how_to_aggregate(config: PPOHyperparameters) -> dict[str, Any]:
    """How the losses of tokens become that of a mini-batch, as `ppo.aggregation` names it."""
    return {"aggregation": config.loss_aggregation, "tokens": config.loss_tokens}
