"""Padded batches, for every model on a GPU and for CPU models that `packed` does not cover.

A batch takes one copy to the device and one back.

Failure modes: a value of an earlier batch in the staging memory; more than one wait for the device in a batch.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch

from plaudit.reward_service.engine.batching import Encoded

GPU_WIDTH_STEP = 8
"""On a GPU, rows are padded to a multiple of this many tokens: tensor cores need it, and there are fewer shapes."""


class PaddedModel:
    """A transformers classifier on one device. Calls must not overlap: they share the staging memory."""

    def __init__(
        self,
        model: Any,
        device: torch.device,
        *,
        pad_id: int,
        max_tokens: int,
        takes_type_ids: bool,
        takes_mask: bool = True,
        compiled: bool = False,
        width_step: int | None = None,
    ) -> None:
        """A negative `pad_id` means no padding token: all texts of a batch must then have one length.

        Rows are widened to a multiple of `width_step` tokens: by default `GPU_WIDTH_STEP` on a GPU, 1 elsewhere.
        With `compiled`, the model is compiled for batches of any shape; `warm_up` does all compilation.
        """
        self._model = torch.compile(model, dynamic=True) if compiled else model
        self._compiled = compiled
        self._max_tokens = max_tokens
        self._device = device
        self._pad_id = pad_id
        self._inputs = ("input_ids", "attention_mask", "token_type_ids")[: 3 if takes_type_ids else 2]
        self._takes_mask = takes_mask
        self._pins = device.type == "cuda"
        self._width_step = width_step or (GPU_WIDTH_STEP if device.type == "cuda" else 1)
        self._staging = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def __call__(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Logits [texts, labels] in fp32, on the CPU."""
        width = max(len(encoded.ids) for encoded in batch)
        if self._pad_id >= 0:
            width = max(width, min(-(-width // self._width_step) * self._width_step, self._max_tokens))
        staged = self._stage(batch, width).to(self._device, non_blocking=True)
        inputs = dict(zip(self._inputs, staged, strict=True))
        if not self._takes_mask:
            del inputs["attention_mask"]
        logits: torch.Tensor = self._model(**inputs).logits
        # The only wait for the device. After it, the staging memory is free for the next batch.
        return logits.float().cpu()

    def warm_up(self, batch_tokens: int) -> None:
        """Compile, and where rows are widened run batches of every order of width. No request waits for either."""
        if self._compiled:
            # The compiler specialises on size 1 and treats every larger size as a variable.
            for rows, length in product((1, 3), (1, 5)):
                self([Encoded([0] * length)] * rows)
        width = self._width_step
        while self._width_step > 1 and width < 2 * self._max_tokens:
            length = min(width, self._max_tokens)
            self([Encoded([0] * length)] * max(1, batch_tokens // length))
            width *= 2

    def _stage(self, batch: Sequence[Encoded], width: int) -> torch.Tensor:
        """All inputs as one tensor [inputs, texts, width], in memory that is reused, and pinned for a GPU."""
        shape = (len(self._inputs), len(batch), width)
        size = shape[0] * shape[1] * shape[2]
        if size > len(self._staging):
            self._staging = torch.empty(size, dtype=torch.int64, pin_memory=self._pins)
        staged = self._staging[:size].view(shape)
        ids, mask, *type_ids = staged.numpy()
        ids.fill(self._pad_id)
        staged[1:].zero_()
        for row, encoded in enumerate(batch):
            length = len(encoded.ids)
            ids[row, :length] = encoded.ids
            mask[row, :length] = 1
            if type_ids and encoded.type_ids is not None:
                type_ids[0][row, :length] = encoded.type_ids
        return staged
