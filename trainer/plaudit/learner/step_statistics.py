"""The statistics of a step, under the names that users of the classic trainer know.

`measure` computes those of a mini-batch on the device, from tensors of one shape, [b, T] or [N]; nothing is read on the
host. Failure mode: a statistic that counts padding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from plaudit.learner.experience import Experience
from plaudit.learner.objective import RolloutTokens, clipped_losses, how_to_aggregate, kl_terms, policy_clips
from plaudit.policy.model import ResponseOutputs
from plaudit.ppo import losses
from plaudit.ppo.aggregation import aggregate
from plaudit.ppo.masked import masked_mean, masked_sum, masked_var
from plaudit.settings.ppo import PPOHyperparameters

STATISTICS = (
    *(f"ppo/loss/{name}" for name in ("policy", "value", "total")),
    *(f"ppo/policy/{name}" for name in ("entropy", "approxkl", "policykl", "clipfrac", "advantages_mean", "ratio")),
    "ppo/policy/ratio_drift",
    *("ppo/returns/mean", "ppo/returns/var"),
    *(f"ppo/val/{name}" for name in ("vpred", "error", "clipfrac", "mean", "var")),
)
"""What is measured of each mini-batch, in the order of `measure`."""

OF_THE_CRITIC = ("ppo/loss/value", "ppo/returns/", "ppo/val/")


def measure(
    old: RolloutTokens, new: ResponseOutputs, config: PPOHyperparameters, ref_logprobs: Tensor | None = None
) -> dict[str, Tensor]:
    """The statistics of a whole mini-batch: one number on the device for each of `STATISTICS`.

    Without a critic, those of values and returns are left out. With a KL term in the loss, for which `ref_logprobs` are
    needed, `ppo/loss/kl` is one more.
    """
    mask = old.mask
    log_ratios = new.logprobs - old.logprobs
    ratios = log_ratios.exp()
    policy_losses, value_losses = clipped_losses(old, new, config)
    how = how_to_aggregate(config)
    policy_loss, value_loss = aggregate(policy_losses, mask, **how), aggregate(value_losses, mask, **how)
    entropy = masked_mean(new.entropy, mask)
    entropy_bonus = config.entropy_coef * aggregate(new.entropy, mask, **how)
    total = policy_loss + config.vf_coef * value_loss - entropy_bonus
    kl_loss = {}
    if config.kl_loss_coef != 0:
        kl_loss["ppo/loss/kl"] = aggregate(kl_terms(old, new, config, ref_logprobs), mask, **how)
        total = total + config.kl_loss_coef * kl_loss["ppo/loss/kl"]
    policy_clipped = losses.policy_clipped(ratios, old.advantages, **policy_clips(config))
    value_clipped = losses.value_clipped(new.values, old.values, old.returns, cliprange=config.cliprange_value)
    statistics = {
        "ppo/loss/policy": policy_loss,
        "ppo/loss/value": value_loss,
        "ppo/loss/total": total,
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
        **kl_loss,
    }
    return {k: v for k, v in statistics.items() if not (config.critic_free and k.startswith(OF_THE_CRITIC))}


def averaged(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The statistics of all mini-batches of a step, averaged; the ratio's drift is that of the first one."""
    statistics = {name: sum(entry[name] for entry in history) / len(history) for name in history[0]}
    if "ppo/returns/var" in statistics:
        variance = statistics["ppo/returns/var"]
        statistics["ppo/val/var_explained"] = 1 - statistics["ppo/val/error"] / variance if variance > 0 else 0.0
    statistics["ppo/policy/ratio_drift"] = history[0]["ppo/policy/ratio_drift"]
    return statistics


def of_experience(experience: Experience, *, kl_coef: float) -> dict[str, float]:
    """What is known of a step before its updates: KL, entropy, scores, lengths."""
    rollout, mask = experience.rollout, experience.rollout.samples.mask
    return {
        "objective/kl": masked_sum(experience.kls, mask, dim=1).mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": masked_sum(-rollout.logprobs, mask, dim=1).mean().item(),
        "ppo/mean_non_score_reward": masked_mean(experience.non_score_rewards, mask).item(),
        "ppo/mean_scores": experience.scores.mean().item(),
        "ppo/std_scores": std_or_zero(experience.scores),
        **_length_statistics("queries", rollout.samples.query_lengths),
        **_length_statistics("responses", rollout.samples.response_lengths),
    }


def std_or_zero(values: Tensor) -> float:
    """The sample standard deviation; 0 of a single value, which has none."""
    return values.std().item() if values.numel() > 1 else 0.0


def _length_statistics(name: str, lengths: Tensor) -> dict[str, float]:
    lengths = lengths.float()
    return {f"tokens/{name}_len_mean": lengths.mean().item(), f"tokens/{name}_len_std": std_or_zero(lengths)}
