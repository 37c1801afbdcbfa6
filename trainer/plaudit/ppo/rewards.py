"""Convert one score per sample to one reward per token.

Failure mode: a score is placed on a padding token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plaudit.ppo.shapes import require_one_a_row, require_rank, require_same_shape


@dataclass(frozen=True)
class RunningMoments:
    """Mean and variance of every score seen so far (Welford, merged batch by batch)."""

    count: float = 0.0
    mean: float = 0.0
    var: float = 1.0
    """Population variance (divisor n)."""

    def update(self, scores: Tensor) -> "RunningMoments":
        """The moments after another batch of scores, [B]. Raises `ValueError` for another number of dimensions."""
        require_rank(1, scores=scores)
        batch_var, batch_mean = torch.var_mean(scores.double(), unbiased=False)
        n = scores.numel()
        total = self.count + n
        delta = batch_mean.item() - self.mean
        squares = self.var * self.count + batch_var.item() * n + delta**2 * self.count * n / total
        return RunningMoments(count=total, mean=self.mean + delta * n / total, var=squares / total)

    @property
    def std(self) -> float:
        """Unbiased standard deviation (divisor n - 1); 1 before there are two scores to compare."""
        return (self.var * self.count / (self.count - 1)) ** 0.5 if self.count > 1 else 1.0


def scale_scores(scores: Tensor, moments: RunningMoments) -> Tensor:
    """Scores [B] over their running standard deviation; the sign and zero stay where they are."""
    return scores / (moments.std + torch.finfo(torch.float32).eps)


def normalise_scores(scores: Tensor, moments: RunningMoments) -> Tensor:
    """Scores [B] less their running mean, over their running standard deviation."""
    return scale_scores(scores - moments.mean, moments)


def penalise_missing_eos(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """`score - penalty` for each response that ran out of tokens, [B]. `ended` [B] is True where the last token is EOS.

    Raises `ValueError` for different shapes.
    """
    require_same_shape(scores=scores, ended=ended)
    return scores - penalty * (~ended).to(scores.dtype)


def penalise_length(scores: Tensor, lengths: Tensor, *, free_tokens: int, penalty_per_token: float) -> Tensor:
    """`score - penalty_per_token * max(0, length - free_tokens)`, [B]. `lengths` [B] counts response tokens.

    Raises `ValueError` for different shapes.
    """
    require_same_shape(scores=scores, lengths=lengths)
    return scores - penalty_per_token * (lengths - free_tokens).clamp(min=0).to(scores.dtype)


def token_rewards(scores: Tensor, kls: Tensor, mask: Tensor, *, kl_coef: float) -> tuple[Tensor, Tensor]:
    """reward_t = -beta * kl_t, plus the score at the last real token of its row.

    `scores` [B], `kls` and `mask` [B, T]; every row of the mask needs a real token. Returns the rewards and their
    part that is not the score, both [B, T] and 0 outside the mask.

    Raises:
        ValueError: the shapes don't belong together, or a row of the mask is empty.
    """
    require_rank(2, mask=mask)
    require_same_shape(mask=mask, kls=kls)
    require_one_a_row(mask, "mask", scores=scores)
    if not bool(mask.any(1).all()):
        raise ValueError("a row without a response token has nowhere to put its score")
    non_score = (-kl_coef * kls).masked_fill(~mask, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (columns * mask).argmax(1, keepdim=True)
    return non_score.scatter_add(1, last, scores.to(non_score.dtype).unsqueeze(1)), non_score
