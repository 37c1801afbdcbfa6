"""Samples as a model's input: packed without padding, or one padded row each.

Failure modes: a token attends to another sample; a log-probability is taken from the wrong state.
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
"""Usual length of a packed row. Longer rows have less padding at their ends, but more masked attention."""
MUCH_PADDING = 1 / 8
"""Padding at the ends of rows as a share of the tokens: above it, rows of other lengths are tried."""

FEW_CELLS = 2048
"""A padded batch of fewer cells than this is not worth packing, for a model of at most `SMALL_MODEL` parameters."""
SMALL_MODEL = 4_000_000
"""Above it, padding costs more the larger the model is, and the number of cells worth packing falls in proportion."""


@dataclass(frozen=True)
class ModelInput:
    """The arguments of a causal language model, and the positions of the response states."""

    arguments: Mapping[str, Any]
    states: Tensor
    """[N] indices into the model's states, flattened to [rows x columns, H]: the state before each real response token,
    in the order of `mask`."""


def padded(samples: Samples, *, takes_positions: bool, mask_dtype: torch.dtype | None = None) -> ModelInput:
    """One row per sample, [B, Q + T - 1], without the last token. Position ids are unaffected by left padding.

    With `mask_dtype` the model gets a full attention mask, [B, 1, C, C]. For a mask [B, C], transformers would read
    from the device whether there is any padding.
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
    """The dtype of the model's attention: autocast's if it is enabled, else the model's own."""
    device = next(model.parameters()).device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.dtype
    return dtype


def takes_own_mask(model: PreTrainedModel) -> bool:
    """Whether the model follows a mask [R, 1, C, C] exactly: SDPA attention without a sliding window."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    try:
        layers = StaticCache(config=model.config, max_cache_len=1).layers
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return all(type(layer) is StaticLayer for layer in layers)


def worth_packing(samples: Samples, parameters: int) -> bool:
    """Whether packing pays off. Small batches of small models stay padded, to sum in the order of other trainers."""
    cells = samples.query_mask.numel() + samples.mask.numel()
    # A single sample has no padding, and without a mask of ours attention costs less.
    return len(samples) > 1 and cells * max(parameters, SMALL_MODEL) >= FEW_CELLS * SMALL_MODEL


def packed(samples: Samples, *, mask_dtype: torch.dtype | None = None, rounded: bool = False) -> ModelInput:
    """Several samples per row, separated by position ids that restart at 0; no attention mask.

    Padding is only at the ends of rows, at position 0, which separates it from samples. With `mask_dtype` the model
    gets a full attention mask, [R, 1, C, C], so that it need not read positions on the host. `rounded` pads to
    multiples of 8 rows and 16 columns, to limit the number of shapes.
    """
    query_lengths, response_lengths = samples.lengths
    lengths = query_lengths + response_lengths - 1
    places, rows, columns = _rows(lengths.tolist(), rounded=rounded)
    if rounded:
        rows += -rows % 8
    starts = torch.tensor(places)
    # Source and target index of each input token, computed on the host from the lengths alone.
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    position = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    width = samples.query_ids.shape[1] + samples.response_ids.shape[1]
    own_cell = sample * width + (samples.query_ids.shape[1] - query_lengths)[sample] + position
    cell = starts[sample] + position
    # Unused positions hold a query token, because transformers would warn about padding tokens.
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
    """[R, 1, C, C]: a token attends to itself and earlier tokens of its segment [R, C]; segment 0 is padding."""
    columns = segments.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=segments.device).tril()
    together = (segments.unsqueeze(2) == segments.unsqueeze(1)) & (segments > 0).unsqueeze(1)
    # A softmax over an empty set would be NaN.
    itself = torch.eye(columns, dtype=torch.bool, device=segments.device)
    return additive(((together & causal) | itself).unsqueeze(1), dtype)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, -inf elsewhere. Every layer would compute this again from a boolean mask."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def _states(samples: Samples, first: Tensor) -> Tensor:
    """Indices of the states before each real response token; `first` [B] is that of each sample's first one."""
    lengths = samples.lengths[1]
    sample = torch.repeat_interleave(torch.arange(len(samples)), lengths)
    within = torch.arange(len(sample)) - (lengths.cumsum(0) - lengths)[sample]
    return on_device(first[sample] + within, samples.mask.device)


def _rows(lengths: list[int], *, rounded: bool) -> tuple[list[int], int, int]:
    """Each sample's start in the flattened rows, the number of rows, and their length.

    Rows have `PACKED_TOKENS` columns, or as many as the longest sample. Where that leaves much empty, it is a multiple
    of the longest sample that leaves the least.
    """
    longest = max(lengths)
    usual = max(longest, PACKED_TOKENS)
    if rounded:
        return _first_fit(lengths, usual + -usual % 16)
    found = places, rows, columns = _first_fit(lengths, usual)
    if rows == 1:
        return places, 1, sum(lengths)
    if rows * columns <= (1 + MUCH_PADDING) * sum(lengths):
        return found
    multiples = (_first_fit(lengths, columns) for columns in range(longest, usual + longest, longest))
    return min([*multiples, found], key=lambda fit: fit[1] * fit[2])


def _first_fit(lengths: list[int], columns: int) -> tuple[list[int], int, int]:
    """First-fit decreasing into rows of so many columns: starts, number of rows, columns."""
    filled: list[int] = []
    places = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[sample] <= columns), len(filled))
        if row == len(filled):
            filled.append(0)
        places[sample] = row * columns + filled[row]
        filled[row] += lengths[sample]
    return places, len(filled), columns
