"""What a mini-batch's update minimises, and what is measured of it.

Everything here is computed on the device from tensors of one shape, [b, T] or [N]; nothing is read on the host. Failure
mode: a statistic that counts padding.
"""

from typing import Protocol

from torch import Tensor

from plaudit.policy.model import ResponseOutputs
from plaudit.ppo import losses
from plaudit.ppo.masked import masked_mean, masked_var
from plaudit.settings.ppo import PPOHyperparameters

STATISTICS = (
    *(f"ppo/loss/{name}" for name in ("policy", "value", "total")),
    *(f"ppo/policy/{name}" for name in ("entropy", "approxkl", "policykl", "clipfrac", "advantages_mean", "ratio")),
    "ppo/policy/ratio_drift",
    *("ppo/returns/mean", "ppo/returns/var"),
    *(f"ppo/val/{name}" for name in ("vpred", "error", "clipfrac", "mean", "var")),
)
"""What is measured of each mini-batch, in the order of `measure`."""


class Recalled(Protocol):
    """What a rollout remembers of a mini-batch's tokens. All of one shape; `mask` is True on real tokens."""

    @property
    def mask(self) -> Tensor: ...
    @property
    def logprobs(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def advantages(self) -> Tensor: ...
    @property
    def returns(self) -> Tensor: ...


def token_losses(old: Recalled, new: ResponseOutputs, config: PPOHyperparameters) -> Tensor:
    """policy + vf_coef * value - entropy_coef * entropy, for each token: [b, T] or [N], as the tensors of `old`."""
    policy, value = _losses(old, new, config)
    total = policy + config.vf_coef * value
    return total if config.entropy_coef == 0 else total - config.entropy_coef * new.entropy


def measure(old: Recalled, new: ResponseOutputs, config: PPOHyperparameters) -> dict[str, Tensor]:
    """What a whole mini-batch was like: one number on the device, of shape [], for each of `STATISTICS`."""
    mask = old.mask
    log_ratios = new.logprobs - old.logprobs
    ratios = log_ratios.exp()
    policy_losses, value_losses = _losses(old, new, config)
    policy_loss, value_loss = masked_mean(policy_losses, mask), masked_mean(value_losses, mask)
    entropy = masked_mean(new.entropy, mask)
    policy_clipped = losses.policy_clipped(ratios, old.advantages, cliprange=config.cliprange)
    value_clipped = losses.value_clipped(new.values, old.values, old.returns, cliprange=config.cliprange_value)
    return {
        "ppo/loss/policy": policy_loss,
        "ppo/loss/value": value_loss,
        "ppo/loss/total": policy_loss + config.vf_coef * value_loss - config.entropy_coef * entropy,
        "ppo/policy/entropy": entropy,
        "ppo/policy/approxkl": 0.5 * masked_mean(log_ratios.square(), mask),
        "ppo/policy/policykl": masked_mean(-log_ratios, mask),
        "ppo/policy/clipfrac": masked_mean(policy_clipped.float(), mask),
        "ppo/policy/advantages_mean": masked_mean(old.advantages, mask),
        "ppo/policy/ratio": masked_mean(ratios, mask),
        "ppo/policy/ratio_drift": (ratios - 1).masked_fill(~mask, 0.0).abs().max(),
        "ppo/returns/mean": masked_mean(old.returns, mask),
        "ppo/returns/var": masked_var(old.returns, mask),
        "ppo/val/vpred": masked_mean(new.values, mask),
        "ppo/val/error": masked_mean((new.values - old.returns).square(), mask),
        "ppo/val/clipfrac": masked_mean(value_clipped.float(), mask),
        "ppo/val/mean": masked_mean(old.values, mask),
        "ppo/val/var": masked_var(old.values, mask),
    }


def _losses(old: Recalled, new: ResponseOutputs, config: PPOHyperparameters) -> tuple[Tensor, Tensor]:
    ratios = (new.logprobs - old.logprobs).exp()
    return (
        losses.policy_losses(ratios, old.advantages, cliprange=config.cliprange),
        losses.value_losses(new.values, old.values, old.returns, cliprange=config.cliprange_value),
    )
