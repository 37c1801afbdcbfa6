"""Logits in fp32 from a language-model head that computes in half precision.

A half-precision product accumulates in fp32 and then rounds. Logits of a language model lie near -100, where bf16 has
steps of half a nat: log-probabilities, KL and sampling would inherit that error. Here the product is the same and the
rounding is left out. Failure mode: a head that is no plain linear layer (adapters, quantised weights) keeps its own
output type.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def fp32_logits(*heads: nn.Module | None, autocast: torch.dtype | None) -> Iterator[None]:
    """Inside the block these heads give fp32, whatever they multiply in: `autocast`, or the format of their weights."""
    plain = [head for head in heads if type(head) is nn.Linear and (autocast or head.weight.dtype) in HALVES]
    try:
        for head in plain:
            head.forward = _forward_of(head, autocast or head.weight.dtype)  # type: ignore[method-assign]
        yield
    finally:
        for head in plain:
            head.__dict__.pop("forward", None)


def _forward_of(head: nn.Linear, dtype: torch.dtype) -> Any:
    def forward(states: Tensor) -> Tensor:
        logits: Tensor = _Product.apply(states.flatten(0, -2), head.weight, dtype)  # type: ignore[no-untyped-call]
        logits = logits.view(*states.shape[:-1], logits.shape[-1])
        return logits if head.bias is None else logits + head.bias.float()

    return forward


class _Product(torch.autograd.Function):
    """x W^T with factors rounded to `dtype` and sums in fp32, forward and backward; [N, H] gives [N, V]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        half_states, half_weight = states.to(dtype), weight.to(dtype)
        ctx.save_for_backward(half_states, half_weight)
        ctx.types = states.dtype, weight.dtype
        return _fp32_product(half_states, half_weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight = ctx.saved_tensors
        of_states, of_weight = ctx.types
        gradient = gradients[0].to(states.dtype)
        return (
            _fp32_product(gradient, weight).to(of_states) if ctx.needs_input_grad[0] else None,
            _fp32_product(gradient.t(), states).to(of_weight) if ctx.needs_input_grad[1] else None,
            None,
        )


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        # No such product on CPUs; the factors are exact in fp32.
        return left.float() @ right.float()
