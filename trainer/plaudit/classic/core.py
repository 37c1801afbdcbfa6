"""The helpers that programs import from `trl.core`, with their old signatures.

The masked statistics are those of `plaudit.ppo.masked`. Their classic versions take a mask of 0 and 1 and divide 0 by 0
where it is empty; here an empty mask gives 0.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from plaudit.ppo import distributions, masked

WANDB_PADDING = -1


def set_seed(seed: int) -> None:
    """Seeds `random`, `numpy` and `torch`, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class LengthSampler:
    """Draws a length from `min_value` to `max_value - 1`, by numpy's global generator."""

    def __init__(self, min_value: int, max_value: int) -> None:
        """Raises `ValueError` if there is no number from `min_value` up to, but not including, `max_value`."""
        self.values = list(range(min_value, max_value))
        if not self.values:
            raise ValueError(f"LengthSampler({min_value}, {max_value}): max_value itself is never drawn, so nothing is")

    def __call__(self) -> int:
        """The next length."""
        return int(np.random.choice(self.values))


def top_k_top_p_filtering(
    logits: Tensor, top_k: int = 0, top_p: float = 1.0, filter_value: float = -float("inf"), min_tokens_to_keep: int = 1
) -> Tensor:
    """`logits` [B, V] with `filter_value` in place of what top-k, then top-p, leave out; the likeliest always stay."""
    kept = distributions.truncation(logits, top_k=int(top_k), top_p=top_p)
    likeliest = logits.topk(min(min_tokens_to_keep, logits.shape[-1])).indices
    return logits.masked_fill(~kept.scatter(-1, likeliest, True), filter_value)


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """A dictionary of dictionaries as one whose keys are joined by `sep`. Raises `ValueError` if a key holds it."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"key {key!r} holds the separator {sep!r}")
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{name}": inner for name, inner in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def add_suffix(input_dict: Mapping[str, Any], suffix: str) -> dict[str, Any]:
    """The dictionary with `suffix` behind every key."""
    return {key + suffix: value for key, value in input_dict.items()}


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several dictionaries by key, each flat and one a row; shorter ones are padded with -1."""
    return {
        key: pad_sequence(
            [entry[key].flatten() for entry in stats_dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for key in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as arrays, bfloat16 as float32; plain numbers as floats."""
    result: dict[str, Any] = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        result[key] = float(value) if isinstance(value, int | float | np.number) else value
    return result


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays and tensors of one element as numbers, which is what TensorBoard can draw."""
    return {
        key: value.item()
        if isinstance(value, Tensor | np.ndarray) and (value.ndim == 0 or value.shape == (1,))
        else value
        for key, value in stats.items()
    }


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities of `labels` [B, T] under `logits` [B, T, V]; the whole [B, T, V] without `gather`."""
    if not gather:
        return logits.log_softmax(-1)
    if labels is None:
        raise ValueError("labels=None needs gather=False: nothing says which tokens' log-probabilities to take")
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of each distribution, [..., V] -> [...]."""
    log_distribution = logits.log_softmax(-1)
    return -(log_distribution.exp() * log_distribution).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean over the entries whose mask is not 0; over everything, or along `axis`."""
    return masked.masked_mean(values, mask.bool(), axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the entries whose mask is not 0, with the divisor n - 1, or n if not `unbiased`."""
    real = mask.bool()
    variance = masked.masked_var(values, real)
    count = real.sum()
    return variance if unbiased else variance * (count - 1) / count.clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the entries whose mask is not 0, 0 elsewhere; without `shift_mean`, scaled only."""
    return (masked.whiten if shift_mean else masked.scale)(values, mask.bool())


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """`masked_whiten` of everything."""
    return masked_whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """`x` between two bounds, which may be tensors."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.max(torch.min(x, high), low)


@torch.no_grad()
def respond_to_batch(
    model: nn.Module, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """`txt_len` sampled tokens behind each of `queries` [B, Q], all of the same length: [B, txt_len].

    `model` is a causal language model, with a value head or without. Nothing ends a text early.
    """
    was_training = model.training
    model.eval()
    ids = queries
    for _ in range(txt_len):
        logits = model(input_ids=ids)[0][:, -1, :]
        probabilities = top_k_top_p_filtering(logits.float(), top_k=top_k, top_p=top_p).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, num_samples=1)], dim=-1)
    model.train(was_training)
    return ids[:, queries.shape[1] :]
