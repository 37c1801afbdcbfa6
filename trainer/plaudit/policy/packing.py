"""Samples as a model's input: one after another without padding, or a padded row each.

What would be wrong here: a token that sees another sample, or a log-probability taken from the wrong state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from plaudit.policy.samples import Samples, on_device

PACKED_TOKENS = 64
"""Least length of a packed row. Longer ones waste less at their ends, and more on attention that the mask drops."""

FEW_CELLS = 2048
"""A padded batch of fewer cells than this is not worth packing."""


@dataclass(frozen=True)
class ModelInput:
    """What a causal language model is called with, and where its answers are."""

    arguments: Mapping[str, Any]
    states: Tensor
    """[N] indices into the model's states, flattened to [rows x columns, H]: the state before each real response token,
    in the order of `mask`."""


def padded(samples: Samples, *, takes_positions: bool, mask_dtype: torch.dtype | None = None) -> ModelInput:
    """A row a sample, [B, Q + T - 1]: the last token is no input. Left padding shifts no position.

    With `mask_dtype` the model gets the whole attention mask, [B, 1, C, C]. Given one of [B, C], transformers would
    first read on the host whether there is any padding.
    """
    mask = torch.cat([samples.query_mask, samples.written], dim=1)[:, :-1].long()
    arguments = {
        "input_ids": torch.cat([samples.query_ids, samples.response_ids], dim=1)[:, :-1],
        "attention_mask": mask if mask_dtype is None else _own_segments(mask, mask_dtype),
    }
    if takes_positions:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    first = samples.query_ids.shape[1] - 1
    starts = torch.arange(len(samples)) * mask.shape[1] + first
    return ModelInput(arguments, _states(samples, starts))


def attention_dtype(model: PreTrainedModel) -> torch.dtype:
    """The number format of the model's attention, here and now: that of autocast, or the model's own."""
    device = next(model.parameters()).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.dtype
    return dtype


def takes_own_mask(model: PreTrainedModel) -> bool:
    """Whether the model attends as a mask [R, 1, C, C] says and in no other way: torch's attention, no window."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    try:
        layers = StaticCache(config=model.config, max_cache_len=1).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return all(type(layer) is StaticLayer for layer in layers)


def worth_packing(samples: Samples) -> bool:
    """Whether there is enough to save. Few samples stay padded, and add up as they do in other trainers."""
    return samples.query_mask.numel() + samples.mask.numel() >= FEW_CELLS


def packed(samples: Samples, *, mask_dtype: torch.dtype | None = None, rounded: bool = False) -> ModelInput:
    """Several samples a row, each with positions from 0, by which the model tells them apart; no attention mask.

    Padding is left at the ends of rows alone. It stands at position 0, so it is nobody's neighbour. With `mask_dtype`
    the model gets the whole attention mask, [R, 1, C, C], in place of reading the positions on the host. `rounded` adds
    padding up to a multiple of 8 rows and of 16 columns, so that few shapes come up.
    """
    query_lengths, response_lengths = samples.lengths
    lengths = query_lengths + response_lengths - 1
    places, rows, columns = _first_fit(lengths.tolist(), multiple_of=16 if rounded else 1)
    if rounded:
        rows += -rows % 8
    starts = torch.tensor(places)
    # Where each input token stands among the samples' own cells, and where it goes; all of it follows from the lengths.
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    position = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    width = samples.query_ids.shape[1] + samples.response_ids.shape[1]
    own_cell = sample * width + (samples.query_ids.shape[1] - query_lengths)[sample] + position
    cell = starts[sample] + position
    # Elsewhere a token of a query: of padding at the ends of rows, transformers would warn.
    source = torch.full((rows * columns,), samples.query_ids.shape[1] - 1).index_copy(0, cell, own_cell)
    position_ids = torch.zeros(rows * columns, dtype=torch.long).index_copy(0, cell, position)
    segments = torch.zeros(rows * columns, dtype=torch.long).index_copy(0, cell, sample + 1)
    source, position_ids, segments = on_device(torch.stack([source, position_ids, segments]), samples.mask.device)
    ids = torch.cat([samples.query_ids, samples.response_ids], dim=1).flatten()
    arguments = {
        "input_ids": ids.index_select(0, source).view(rows, columns),
        "position_ids": position_ids.view(rows, columns),
    }
    if mask_dtype is not None:
        arguments["attention_mask"] = _own_segments(segments.view(rows, columns), mask_dtype)
    return ModelInput(arguments, _states(samples, starts + query_lengths - 1))


def _own_segments(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, 1, C, C]: a token sees itself and earlier ones of its segment [R, C]; segment 0 is padding."""
    columns = segments.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=segments.device).tril()
    together = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (segments > 0).unsqueeze(1)
    # A softmax over nothing is no number.
    itself = torch.eye(columns, dtype=torch.bool, device=segments.device)
    return additive(((together & causal) | itself).unsqueeze(1), dtype)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, -inf elsewhere. From a mask of booleans, each layer would make this anew."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _states(samples: Samples, first: Tensor) -> Tensor:
    """Indices of the states before each real response token, given that before each sample's first one, [B]."""
    lengths = samples.lengths[1]
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    within = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    return on_device(first[sample] + within, samples.mask.device)


def _first_fit(lengths: list[int], *, multiple_of: int = 1) -> tuple[list[int], int, int]:
    """Where each sample starts in the flattened rows, how many rows there are, and their length. Longest first."""
    columns = max(*lengths, PACKED_TOKENS)
    columns += -columns % multiple_of
    filled: list[int] = []
    places = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[sample] <= columns), len(filled))
        if row == len(filled):
            filled.append(0)
        places[sample] = row * columns + filled[row]
        filled[row] += lengths[sample]
    return places, len(filled), max(filled) if len(filled) == 1 and multiple_of == 1 else columns
