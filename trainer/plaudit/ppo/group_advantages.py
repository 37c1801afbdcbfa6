"""Advantages without a critic: each response is compared with the others to the same prompt.

All functions take the rewards of whole responses, [P, n] for P prompts with n >= 2 responses each, and return one
advantage for each response, [P, n], which every token of the response gets. They raise `ValueError` for another shape.

Failure mode: rewards that are not grouped by prompt.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from plaudit.ppo.shapes import require_rank

EPSILON = 1e-6
"""Added to a group's standard deviation."""


def dr_grpo(rewards: Tensor) -> Tensor:
    """reward - mean of its group (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783): GRPO without the deviation term.

    Rewards of a group that are equal give exactly 0.
    """
    _require_groups(rewards)
    # From the group's first reward, so that rounding the mean leaves nothing where all are equal.
    differences = rewards - rewards[:, :1]
    return differences - differences.mean(1, keepdim=True)


def rloo(rewards: Tensor) -> Tensor:
    """reward - mean of the *other* rewards of its group (REINFORCE leave-one-out: Ahmadian et al. 2024, 2402.14740).

    Equal to `dr_grpo` times n / (n - 1).
    """
    n = rewards.shape[-1]
    return dr_grpo(rewards) * (n / (n - 1))


def grpo(rewards: Tensor) -> Tensor:
    """(reward - mean) / (std + 1e-6) of its group, std with divisor n - 1 (GRPO: Shao et al. 2024, 2402.03300)."""
    centred = dr_grpo(rewards)
    n = rewards.shape[-1]
    std = (centred.square().sum(1, keepdim=True) / (n - 1)).sqrt()
    return centred / (std + EPSILON)


ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}
"""By the name that `advantage_estimator` has in the configuration; `gae` has a critic and is `ppo.advantages.gae`."""


def _require_groups(rewards: Tensor) -> None:
    require_rank(2, rewards=rewards)
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: a group needs at least 2 responses to compare")
