"""How far the policy is from the reference, and how strongly that is punished.

`logprobs` and `ref_logprobs` are those of the sampled tokens, [B, T]; the estimators give one number a token, [B, T],
and raise `ValueError` for different shapes. Schulman, "Approximating KL divergence" (2020), names k1, k2 and k3.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from plaudit.ppo.shapes import require_same_shape


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log ref: unbiased, may be negative on a token."""
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|log p - log ref|: punishes moving either way."""
    return k1(logprobs, ref_logprobs).abs()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log p - log ref)^2 / 2: biased, low variance."""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log p - log ref: unbiased and never negative."""
    difference = k1(logprobs, ref_logprobs)
    return (-difference).expm1() + difference


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": k1, "abs": absolute, "mse": k2, "k3": k3}
"""By the name that `kl_penalty` has in the configuration. `full` needs whole distributions and is `full_kl`."""


def full_kl(log_distribution: Tensor, ref_log_distribution: Tensor) -> Tensor:
    """KL(p || ref) summed over the vocabulary, [..., V] -> [...]. Exact, never negative.

    Tokens that the policy cannot emit (log p = -inf) add nothing. Raises `ValueError` for different shapes.
    """
    require_same_shape(log_distribution=log_distribution, ref_log_distribution=ref_log_distribution)
    possible = log_distribution.isfinite()
    difference = (log_distribution - ref_log_distribution).masked_fill(~possible, 0.0)
    return (log_distribution.exp() * difference).sum(-1)


def adapt_coefficient(coefficient: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon): Ziegler et al. 2019, section 2.2.

    `kl` is the mean over samples of the KL summed over a sample's tokens; `samples` is how many the step had, over all
    processes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * samples / horizon)
