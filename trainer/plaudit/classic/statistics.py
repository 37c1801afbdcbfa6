"""What `PPOTrainer.step` returns: the step's statistics under the classic trainer's names, in its shapes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plaudit.learner.stepper import StepResult
from plaudit.policy.samples import Samples
from plaudit.ppo.masked import masked_sum


def classic_statistics(result: StepResult, samples: Samples, *, padding_side: str) -> dict[str, Any]:
    """The step's numbers, and its tensors: [B] by sample, [B, L - 1] by token of the padded row of L tokens.

    Log-probabilities are those of response tokens and 0 elsewhere. Advantages are [N], of real response tokens.
    """
    lengths = samples.lengths.float()
    return {
        **result.statistics,
        "objective/kl_dist": masked_sum(result.kls, result.mask, dim=1),
        "objective/logprobs": _by_row(result.logprobs, samples, padding_side),
        "objective/ref_logprobs": _by_row(result.ref_logprobs, samples, padding_side),
        "ppo/policy/advantages": result.advantages[result.mask],
        "tokens/queries_dist": lengths[0],
        "tokens/responses_dist": lengths[1],
    }


def _by_row(values: Tensor, samples: Samples, padding_side: str) -> Tensor:
    """[B, T] by response token as [B, L - 1] by token of query and response, from the second token on."""
    queries, responses = samples.lengths.tolist()
    width = max(q + r for q, r in zip(queries, responses, strict=True)) - 1
    rows = []
    for row, query, response in zip(values, queries, responses, strict=True):
        rest = width - (query - 1) - response
        before = query - 1 + (rest if padding_side == "left" else 0)
        rows.append(functional.pad(row[:response], (before, width - before - response)))
    return torch.stack(rows)
