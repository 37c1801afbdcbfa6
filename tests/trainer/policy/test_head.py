"""Logits in fp32 from a head that multiplies in half precision."""

import pytest
import torch
from torch import nn

from plaudit.policy.head import fp32_logits


def head_and_states(offset: float = 0.0, bias: bool = False) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=bias)
    states = torch.randn(2, 7, 64)
    # A common offset of all logits, as GPT-2 has it: no log-probability depends on it, but rounding does.
    states[..., 0] = 1.0
    with torch.no_grad():
        head.weight[:, 0] = offset
    return head, states


@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_log_probabilities_do_not_suffer_from_where_the_logits_lie(offset: float) -> None:
    head, states = head_and_states(offset)
    rounded = head.weight.bfloat16().double() @ states.bfloat16().double().unsqueeze(-1)
    exact = rounded.squeeze(-1).log_softmax(-1).float()
    with fp32_logits(head, autocast=torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        logits = head(states)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.log_softmax(-1), exact, atol=2e-4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = head(states).float().log_softmax(-1)
    if offset:
        assert (plain - exact).abs().max() > 0.1, "bf16 logits near -100 are steps of half a nat apart"


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_rounded_factors(bias: bool) -> None:
    head, states = head_and_states(bias=bias)
    states.requires_grad_()
    upstream = torch.randn(2, 7, 500)
    with fp32_logits(head, autocast=torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        head(states).backward(upstream)
    assert states.grad is not None
    assert head.weight.grad is not None
    half = upstream.bfloat16().double()
    assert torch.allclose(states.grad.double(), half @ head.weight.bfloat16().double(), atol=1e-4)
    expected = half.flatten(0, 1).t() @ states.bfloat16().double().flatten(0, 1)
    assert torch.allclose(head.weight.grad.double(), expected, atol=1e-4)
    if bias:
        assert head.bias.grad is not None
        assert torch.allclose(head.bias.grad, upstream.sum((0, 1)), atol=1e-4)


def test_a_half_precision_model_without_autocast_answers_in_fp32() -> None:
    head, states = head_and_states()
    head = head.half()
    with fp32_logits(head, autocast=None):
        assert head(states.half()).dtype == torch.float32
    assert head(states.half()).dtype == torch.float16


def test_full_precision_and_other_kinds_of_heads_are_left_alone() -> None:
    head, states = head_and_states()

    class Scaled(nn.Linear):
        """Another kind of layer, whose own way to compute must count."""

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(states)

    other = Scaled(64, 5).bfloat16()
    with fp32_logits(head, other, None, autocast=None):
        assert "forward" not in vars(head)
        assert other(states.bfloat16()).dtype == torch.bfloat16
