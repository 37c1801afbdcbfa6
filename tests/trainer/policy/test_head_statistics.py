"""Log-probabilities and entropies straight from the states before the head: closed forms, and one buffer for all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.tiny_models import tiny_gpt2, tiny_llama
from plaudit.policy.adapters import add_lora
from plaudit.policy.head import fp32_logits
from plaudit.policy.head_statistics import head_statistics
from plaudit.policy.model import PIECES, Policy
from plaudit.policy.samples import Samples
from plaudit.ppo import distributions
from plaudit.settings.policy import LoraSettings

VOCABULARY = 300
ROWS = 3


def random_case(*, bias: bool, dtype: torch.dtype, tokens: int = 7) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, states, sampled tokens and a support that holds them; 7 rows make pieces of 3, 3 and 1."""
    torch.manual_seed(0)
    head = nn.Linear(4, 11, bias=bias).to(dtype)
    chosen = torch.randint(11, (tokens,))
    support = (torch.rand(tokens, 11) < 0.5).scatter(1, chosen[:, None], True)
    return head, torch.randn(tokens, 4, dtype=dtype, requires_grad=True), chosen, support


def test_two_tokens_by_hand() -> None:
    head = nn.Linear(1, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [math.log(3)]]))
        head.bias.zero_()
    states = torch.ones(1, 1, requires_grad=True)
    logprobs, entropies = head_statistics(head, states, torch.tensor([1]), rows=4, entropy=True)
    assert entropies is not None
    assert logprobs.item() == pytest.approx(math.log(3 / 4))
    assert entropies.item() == pytest.approx(0.562335)
    (of_logprobs,) = torch.autograd.grad(logprobs, head.bias, retain_graph=True)
    assert of_logprobs.tolist() == pytest.approx([-1 / 4, 1 / 4])
    of_bias, of_state = torch.autograd.grad(entropies, [head.bias, states])
    assert of_bias.tolist() == pytest.approx([0.205990, -0.205990], abs=1e-6)
    assert of_state.item() == pytest.approx(-0.205990 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("truncated", [True, False])
def test_gradients_are_the_slopes_of_the_outputs(bias: bool, truncated: bool) -> None:
    head, states, tokens, support = random_case(bias=bias, dtype=torch.float64)

    def outputs(states: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        kept = distributions.pack(support) if truncated else None
        logprobs, entropies = head_statistics(head, states, tokens, rows=3, temperature=0.7, support=kept, entropy=True)
        assert entropies is not None
        return logprobs, entropies

    assert torch.autograd.gradcheck(outputs, (states, *head.parameters()))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_head_in_any_format_gives_what_its_whole_logits_give(
    weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    head, states, tokens, support = random_case(bias=True, dtype=weights)
    with fp32_logits(head, autocast=autocast):
        logits = distributions.sampling_logits(head(states), temperature=0.7, support=support)
    whole = distributions.token_statistics(logits, tokens, entropy=True)
    pieces = head_statistics(
        head, states, tokens, rows=3, dtype=autocast, temperature=0.7, support=distributions.pack(support), entropy=True
    )
    gradients = []
    for logprobs, entropies in (whole, pieces):
        assert entropies is not None
        assert logprobs.dtype == entropies.dtype == torch.float32
        loss = (torch.linspace(-1.0, 1.0, 7) * logprobs).sum() + (torch.linspace(1.0, 0.3, 7) * entropies).sum()
        gradients.append(torch.autograd.grad(loss, [states, *head.parameters()]))
    for expected, got in zip(whole, pieces, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    for expected, got in zip(*gradients, strict=True):
        assert got.dtype == expected.dtype == weights
        # The same factors; sums of them are rounded to the weights' format once.
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=2 * torch.finfo(weights).eps)


@pytest.mark.parametrize("of", ["log-probabilities", "entropies"])
def test_one_output_may_go_without_a_gradient(of: str) -> None:
    head, states, tokens, support = random_case(bias=True, dtype=torch.float64)
    logprobs, entropies = head_statistics(
        head, states, tokens, rows=3, support=distributions.pack(support), entropy=True
    )
    logits = distributions.sampling_logits(head(states), support=support).double()
    whole = logits.log_softmax(-1)
    if of == "entropies":
        expected, got = -(whole.exp() * whole.masked_fill(~support, 0.0)).sum(), entropies
    else:
        expected, got = whole.gather(-1, tokens[:, None]).sum(), logprobs
    assert got is not None
    for one, other in zip(
        *(torch.autograd.grad(x, [states, *head.parameters()]) for x in (got.sum(), expected)), strict=True
    ):
        # `sampling_logits` is fp32.
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


class Allocations(TorchDispatchMode):
    """Counts the tensors [..., V] with memory of their own that operations make, weights left out."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in [*args, *kwargs.values()] if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[0] != 32:
                of_logits = tensor.shape[-1] == VOCABULARY and tensor.is_floating_point()
                self.count += of_logits and tensor.untyped_storage()._cdata not in given
        return result


@pytest.mark.parametrize("make", [lambda: add_lora(tiny_gpt2(), LoraSettings(r=4, alpha=8)), tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"entropy": False}], ids=str)
@pytest.mark.parametrize("truncated", [True, False])
def test_a_pass_makes_no_more_tensors_of_logits_for_more_tokens(
    make: Callable[[], nn.Module], options: dict[str, Any], truncated: bool
) -> None:
    policy = Policy(make(), logits_mib=ROWS * VOCABULARY * 4 * PIECES / 2**20)
    counts = []
    for length in (10, 40):
        samples = Samples.from_lists([[5, 6]] * 3, [list(range(7, 7 + length))] * 3, pad_token_id=0)
        assert policy.in_pieces(len(samples.cells))
        support = policy.support(samples, top_k=20) if truncated else None
        with Allocations() as allocations:
            outputs = policy(samples, support=support, **options)
            (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
        counts.append(allocations.count)
    # Two buffers forward and two backward, and the pass's logits of no token.
    assert counts[0] == counts[1] <= 6
