"""The loss for ranked answers, as a pure function of tensors."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def ranking_loss(
    scores: Tensor,
    first: Tensor,
    second: Tensor,
    target: Tensor,
    *,
    margin: Tensor,
    weight: Tensor,
    prompts: int,
    centring: float = 0.0,
) -> Tensor:
    """The Bradley-Terry cross-entropy of soft targets; a scalar.

        1 / B sum_b 1 / |P_b| sum_(i, j in P_b) [ CE(p_ij, sigmoid(r_i - r_j - m_ij)) + c (r_i + r_j)^2 ]

    `scores` r [N] are the scores of the batch's answers. `first` and `second` [P] are the indices of each pair's
    answers. `target` p [P] is how often people preferred the first (a tie counts 1/2), and `margin` m [P] by how much
    it should win. `weight` [P] is 1 / |P_b|, so that each of the B `prompts` has weight 1 however many answers it has.
    `centring` c pulls the mean score towards 0 (Eisenstein et al. 2023, "Helping or herding?"; TRL's
    `center_rewards_coefficient`).

    With two answers per prompt, targets of 1 and no margin, this is the loss of Ouyang et al. 2022, eq. 1.
    """
    better, worse = scores[first], scores[second]
    loss = binary_cross_entropy_with_logits(better - worse - margin, target, reduction="none")
    if centring:
        loss = loss + centring * torch.square(better + worse)
    return (weight * loss).sum() / prompts
