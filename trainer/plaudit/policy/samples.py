"""Batches of queries and responses, and what a rollout knows about them.

Everything is indexed by response token: `logprobs[b, t]` belongs to token t of response b, `values[b, t]` to the state
before it. `mask` is True on real tokens. Queries are padded on the left and responses on the right, so a row is
query ++ response and every response starts at the same column.

Lengths are known on the host, and so is everything that follows from them alone: which rows and columns a selection
has, where the real tokens are. A GPU is asked for them once and never waited for again.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """B queries and their responses, as tokens."""

    query_ids: Tensor
    """[B, Q], padded on the left."""
    query_mask: Tensor
    """[B, Q] bool, True on real tokens."""
    response_ids: Tensor
    """[B, T], padded on the right."""
    mask: Tensor
    """[B, T] bool, True on real tokens that count (`counting`)."""

    @classmethod
    def from_lists(
        cls,
        queries: Sequence[Tensor | Sequence[int]],
        responses: Sequence[Tensor | Sequence[int]],
        pad_token_id: int,
        device: torch.device | str | None = None,
    ) -> "Samples":
        """Pads ragged token lists, B of each, to [B, Q] and [B, T].

        Raises `ValueError` if the counts differ or a query or response has no token.
        """
        if len(queries) != len(responses):
            raise ValueError(f"{len(queries)} queries and {len(responses)} responses must be as many")
        query_ids, query_mask = _pad(queries, pad_token_id, left=True, name="query")
        response_ids, mask = _pad(responses, pad_token_id, left=False, name="response")
        samples = cls(query_ids, query_mask, response_ids, mask)
        # Counted here, where the host has the masks.
        return samples._of_lengths(samples.lengths).to(device)

    def answered(self, tokens: Tensor, written: Tensor) -> "Samples":
        """These queries with other responses: the first `written` [B] of each row of `tokens` [B, T]."""
        lengths = torch.stack([self.lengths[0], written.cpu()])
        columns = torch.arange(int(lengths[1].max()), device=tokens.device)
        mask = columns < written.unsqueeze(1)
        return Samples(self.query_ids, self.query_mask, tokens[:, : len(columns)], mask)._of_lengths(lengths)

    def counting(self, masks: Sequence[Tensor | Sequence[int]]) -> "Samples":
        """The same samples, of whose tokens only those count that `masks`, one for each response, have as 1.

        The others stay in the context of what follows them. `ValueError` if a mask has another length.
        """
        for i, (mask, length) in enumerate(zip(masks, self.lengths[1].tolist(), strict=True)):
            if len(mask) != length:
                raise ValueError(f"mask {i} has {len(mask)} entries for a response of {length} tokens")
        counted, _ = _pad(masks, 0, left=False, name="mask")
        mask = self.mask & counted.bool().to(self.mask.device)
        return dataclasses.replace(self, mask=mask)._of_lengths(self.lengths)

    def __len__(self) -> int:
        return self.query_ids.shape[0]

    def to(self, device: torch.device | str | None) -> "Samples":
        """The same samples on another device; None leaves them where they are."""
        if device is None:
            return self
        moved = Samples(*(getattr(self, f.name).to(device) for f in dataclasses.fields(self)))
        return moved._of_lengths(self.lengths)

    @functools.cached_property
    def lengths(self) -> Tensor:
        """[2, B] on the host: tokens of each query and of each response."""
        return torch.stack([self.query_mask.sum(1), self.mask.sum(1)]).cpu()

    def _of_lengths(self, lengths: Tensor) -> "Samples":
        """These samples, whose lengths are known already."""
        self.__dict__["lengths"] = lengths
        return self

    @property
    def written(self) -> Tensor:
        """[B, T] bool, True on real tokens, whether they count or not."""
        return on_device(self._written, self.mask.device)

    @property
    def _written(self) -> Tensor:
        return torch.arange(self.mask.shape[1]) < self.lengths[1].unsqueeze(1)

    @functools.cached_property
    def cells(self) -> Tensor:
        """[N], where the real response tokens are in [B, T] made flat."""
        return on_device(self._written.flatten().nonzero().squeeze(1), self.mask.device)

    def select(self, indices: Tensor | Sequence[int]) -> "Samples":
        """The rows `indices` [b] in this order, without the padding columns that none of them needs."""
        chosen = torch.as_tensor(indices).cpu()
        lengths = self.lengths[:, chosen]
        skip = self.query_ids.shape[1] - int(lengths[0].max())
        keep = int(lengths[1].max())
        rows = on_device(chosen, self.mask.device)
        return Samples(
            self.query_ids[:, skip:].index_select(0, rows),
            self.query_mask[:, skip:].index_select(0, rows),
            self.response_ids[:, :keep].index_select(0, rows),
            self.mask[:, :keep].index_select(0, rows),
        )._of_lengths(lengths)

    def gather(self, values: Tensor) -> Tensor:
        """[B, T, ...], one for each response token, as [N, ...] for the real ones in the order of `mask`."""
        return values.flatten(0, 1).index_select(0, self.cells)

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:
        """[N, ...], one for each real response token in the order of `mask`, as [B, T, ...] with `fill` on padding."""
        spread = values.new_full((self.mask.numel(), *values.shape[1:]), fill)
        return spread.index_copy(0, self.cells, values).view(*self.mask.shape, *values.shape[1:])

    def chunks(self, size: int) -> Iterator["Samples"]:
        """Consecutive groups of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self.select(range(start, min(start + size, len(self))))

    @classmethod
    def concatenate(cls, parts: Sequence["Samples"]) -> "Samples":
        """All rows in order, padded to the widest part."""
        return cls(
            query_ids=stack_rows([part.query_ids for part in parts], dim=1, left=True, fill=0),
            query_mask=stack_rows([part.query_mask for part in parts], dim=1, left=True, fill=False),
            response_ids=stack_rows([part.response_ids for part in parts], dim=1, fill=0),
            mask=stack_rows([part.mask for part in parts], dim=1, fill=False),
        )._of_lengths(torch.cat([part.lengths for part in parts], dim=1))

    @property
    def query_lengths(self) -> Tensor:
        """[B], in tokens."""
        return on_device(self.lengths[0], self.mask.device)

    @property
    def response_lengths(self) -> Tensor:
        """[B], in tokens."""
        return on_device(self.lengths[1], self.mask.device)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a small tensor of the host, without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pad(rows: Sequence[Tensor | Sequence[int]], pad_token_id: int, *, left: bool, name: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T]. A few operations for all rows: on a GPU, an operation a row would be most of a step."""
    for i, row in enumerate(rows):
        if (isinstance(row, Tensor) and row.ndim != 1) or len(row) == 0:
            shape = tuple(row.shape) if isinstance(row, Tensor) else (0,)
            raise ValueError(f"{name} {i} must be a list of at least one token, not of shape {shape}")
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    columns = torch.arange(width)
    mask = columns >= width - lengths.unsqueeze(1) if left else columns < lengths.unsqueeze(1)
    tokens = [token for row in rows for token in (row.tolist() if isinstance(row, Tensor) else row)]
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    # In the order of rows and columns, as the mask's real cells are.
    return ids.masked_scatter(mask, torch.tensor(tokens, dtype=torch.long)), mask


@dataclass(frozen=True, kw_only=True)
class EvaluatedSamples:
    """Samples with their tokens' log-probabilities and values, under the policy that drew them and the reference."""

    samples: Samples
    logprobs: Tensor
    """[B, T], of the policy that sampled."""
    values: Tensor
    """[B, T]."""
    ref_logprobs: Tensor
    """[B, T], of the reference."""
    full_kl: Tensor | None = None
    """[B, T], KL over the whole vocabulary; only with `kl_penalty="full"`."""
    support: Tensor | None = None
    """[B, T, ceil(V / 8)] uint8, the tokens that top-k or top-p left to choose from, packed eight to a byte; only when
    sampling truncates."""

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def concatenate(cls, parts: Sequence["EvaluatedSamples"]) -> "EvaluatedSamples":
        """All rows in order, padded to the widest part. Either every part has an optional field or none."""
        samples = Samples.concatenate([part.samples for part in parts])
        fields = {}
        for name in ("logprobs", "values", "ref_logprobs", "full_kl", "support"):
            tensors = [getattr(part, name) for part in parts]
            present = [tensor for tensor in tensors if tensor is not None]
            if len(present) not in (0, len(parts)):
                raise ValueError(f"{len(present)} of {len(parts)} parts have {name}; all of them must, or none")
            if present:
                # A padded position may choose any token: with none, its log-probabilities would be NaN under the mask.
                fields[name] = stack_rows(present, dim=1, fill=255 if name == "support" else 0)
        return cls(samples=samples, **fields)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return dataclasses.replace(self, **{k: v.to(device) for k, v in vars(self).items() if v is not None})

    def with_scores(self, scores: Tensor) -> "Rollout":
        """The rollout, once `scores` [B] are there."""
        return Rollout(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, scores=scores)


@dataclass(frozen=True, kw_only=True)
class Rollout(EvaluatedSamples):
    """Everything an update needs to know about the moment its samples were drawn."""

    scores: Tensor
    """[B], one reward a sample."""


def stack_rows(tensors: Sequence[Tensor], *, dim: int, left: bool = False, fill: float = 0) -> Tensor:
    """Rows of tensors that differ in width along `dim`, the dimension after theirs; `fill` pads the narrower ones.

    With `dim=1`, tensors [b_i, t_i, ...] give [sum b_i, max t_i, ...].
    """
    width = max(tensor.shape[dim] for tensor in tensors)
    padded = []
    for tensor in tensors:
        missing = list(tensor.shape)
        missing[dim] = width - tensor.shape[dim]
        padding = tensor.new_full(missing, fill)
        padded.append(torch.cat([padding, tensor] if left else [tensor, padding], dim=dim))
    return torch.cat(padded, dim=dim - 1)
