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
LOSS_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the name that `kl_loss` has in the configuration."""


def loss_terms(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str, weighted: bool
) -> Tensor:
    """A KL term of the loss for each sampled token, [B, T] or [N]; the gradient goes through `logprobs` alone.

    Tokens come from the policy that sampled, p_old. `weighted` multiplies by the ratio p / p_old, so that the gradient
    in expectation is that of KL(p || ref) in every epoch:

    | estimator | term, with d = log p - log ref | its expectation over p_old |
    | --- | --- | --- |
    | k1 | ratio * d | KL(p || ref) |
    | k2 | ratio * d^2 / 2, the ratio without a gradient | another value, the gradient of KL(p || ref) |
    | k3 | ratio * (exp(-d) - 1 + d) | KL(p || ref) (DeepSeek-V3.2, arXiv 2512.02556) |

    Not `weighted`, the term is the estimator alone: k3 is that of GRPO (arXiv 2402.03300). While p = p_old, the
    gradient of k2 is then still that of KL(p || ref), and that of k3 is that of KL(ref || p); that of k1 is zero in
    expectation ("Rethinking KL regularization in RLHF", arXiv 2510.01555), so k1 must be weighted.

    Raises:
        ValueError: the shapes differ, the estimator has another name, or k1 is not weighted.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    if estimator not in LOSS_ESTIMATORS:
        raise ValueError(f"{estimator} is none of {', '.join(LOSS_ESTIMATORS)}")
    terms = LOSS_ESTIMATORS[estimator](logprobs, ref_logprobs)
    if weighted:
        ratios = (logprobs - old_logprobs).exp()
        return (ratios.detach() if estimator == "k2" else ratios) * terms
    if estimator == "k1":
        raise ValueError("the gradient of k1 as a loss is zero in expectation unless it is weighted")
    return terms


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
