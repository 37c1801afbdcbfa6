"""Samples as a model's input: one after another without padding, or a padded row each.

What would be wrong here: a token that sees another sample, or a log-probability taken from the wrong state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plaudit.policy.samples import Samples

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


def padded(samples: Samples, *, takes_positions: bool) -> ModelInput:
    """A row a sample, [B, Q + T - 1]: the last token is no input. Left padding shifts no position."""
    mask = torch.cat([samples.query_mask, samples.mask], dim=1)[:, :-1].long()
    arguments = {
        "input_ids": torch.cat([samples.query_ids, samples.response_ids], dim=1)[:, :-1],
        "attention_mask": mask,
    }
    if takes_positions:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    first = samples.query_ids.shape[1] - 1
    starts = torch.arange(len(samples), device=mask.device) * mask.shape[1] + first
    return ModelInput(arguments, _states(samples, starts))


def worth_packing(samples: Samples) -> bool:
    """Whether there is enough to save. Few samples stay padded, and add up as they do in other trainers."""
    return samples.query_mask.numel() + samples.mask.numel() >= FEW_CELLS


def packed(samples: Samples) -> ModelInput:
    """Several samples a row, each with positions from 0, by which the model tells them apart; no attention mask.

    Padding is left at the ends of rows alone. It stands at position 0, so it is nobody's neighbour.
    """
    device = samples.mask.device
    lengths = samples.query_lengths + samples.response_lengths - 1
    places, rows, columns = _first_fit(lengths.tolist())
    starts = torch.tensor(places, device=device)

    ids = torch.cat([samples.query_ids, samples.response_ids], dim=1)
    real = torch.cat([samples.query_mask, samples.mask], dim=1)
    positions = real.cumsum(1) - 1
    inputs = real & (positions < lengths.unsqueeze(1))
    cells = (starts.unsqueeze(1) + positions)[inputs]
    # A token of a query: of padding at the ends of rows, transformers would warn.
    filler = samples.query_ids[0, -1]
    input_ids = filler.repeat(rows * columns).index_copy(0, cells, ids[inputs])
    position_ids = ids.new_zeros(rows * columns).index_copy(0, cells, positions[inputs])
    arguments = {"input_ids": input_ids.view(rows, columns), "position_ids": position_ids.view(rows, columns)}
    return ModelInput(arguments, _states(samples, starts + samples.query_lengths - 1))


def _states(samples: Samples, first: Tensor) -> Tensor:
    """Indices of the states before each real response token, given that before each sample's first one, [B]."""
    columns = torch.arange(samples.mask.shape[1], device=first.device)
    return (first.unsqueeze(1) + columns)[samples.mask]


def _first_fit(lengths: list[int]) -> tuple[list[int], int, int]:
    """Where each sample starts in the flattened rows, how many rows there are, and their length. Longest first."""
    columns = max(*lengths, PACKED_TOKENS)
    filled: list[int] = []
    places = [0] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[sample] <= columns), len(filled))
        if row == len(filled):
            filled.append(0)
        places[sample] = row * columns + filled[row]
        filled[row] += lengths[sample]
    return places, len(filled), max(filled) if len(filled) == 1 else columns
