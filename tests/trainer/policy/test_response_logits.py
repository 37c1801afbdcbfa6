"""Response tokens that go through the output head in pieces: the same numbers, and never all logits at once."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from harness.tiny_models import ARCHITECTURES, tiny_gpt2, tiny_llama
from plaudit.learner.evaluator import Evaluator
from plaudit.learner.graphs import Graphs
from plaudit.learner.memory import BatchSizeFinder
from plaudit.learner.stepper import PPOStepper
from plaudit.policy.adapters import add_lora
from plaudit.policy.model import PIECES, Policy
from plaudit.policy.samples import Samples
from plaudit.settings.policy import GenerationSettings, LoraSettings
from plaudit.settings.ppo import PPOHyperparameters

LORA = LoraSettings(r=4, alpha=8)
VOCABULARY = 300
ROWS = 3
LIMIT = ROWS * VOCABULARY * 4 * PIECES / 2**20
"""MiB of logits above which a pass goes in pieces of `ROWS` rows."""


def ragged(count: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(longest)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(5, 290, (length,), generator=generator).tolist() for length in lengths]


def samples(count: int = 12) -> Samples:
    return Samples.from_lists(ragged(count, 6), ragged(count, 8), pad_token_id=0)


def adapted_head() -> nn.Module:
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


LEARNING: dict[str, Callable[[], nn.Module]] = {
    "adapters": lambda: add_lora(tiny_gpt2(), LORA),
    "adapters on the head": adapted_head,
    "all of it, tied head": tiny_gpt2,
    "all of it": tiny_llama,
}


def pair(make: Callable[[], nn.Module]) -> tuple[Policy, Policy]:
    """The same policy with and without pieces, with adapters and value head that are not zero."""
    policies = []
    for limit in (512.0, LIMIT):
        torch.manual_seed(0)
        policy = Policy(make(), logits_mib=limit)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name or name.startswith("v_head"):
                    parameter.normal_(std=0.1)
        policies.append(policy)
    return policies[0], policies[1]


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"entropy": False}], ids=str)
def test_outputs_and_gradients_are_those_of_whole_logits(learning: str, options: dict[str, Any]) -> None:
    whole, pieces = pair(LEARNING[learning])
    assert pieces.in_pieces(len(samples().cells))
    assert not whole.in_pieces(len(samples().cells))
    for policy in (whole, pieces):
        outputs = policy.train()(samples(), **options)
        weights = torch.linspace(-1.0, 1.0, outputs.logprobs.numel()).view_as(outputs.logprobs)
        loss = (weights * outputs.logprobs).sum() + outputs.values.sum()
        (loss + (weights.square() * outputs.entropy).sum() if options.get("entropy", True) else loss).backward()
    expected, got = whole(samples(), **options), pieces(samples(), **options)
    for name in ("logprobs", "values", "entropy"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), atol=1e-6), name
    for (name, one), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= 1e-6 * max(1.0, one.grad.abs().max().item()), name


@pytest.mark.parametrize("learning", ["adapters", "adapters on the head"])
@pytest.mark.parametrize("sampling", [{}, {"top_k": 20}, {"top_p": 0.5, "temperature": 0.7}], ids=str)
def test_reference_support_and_full_kl_are_those_of_whole_logits(learning: str, sampling: dict[str, Any]) -> None:
    whole, pieces = pair(LEARNING[learning])
    temperature = {"temperature": sampling.get("temperature", 1.0)}
    support = whole.support(samples(), **sampling)
    own_support = pieces.support(samples(), **sampling)
    if support is None or own_support is None:
        assert support is own_support
    else:
        assert torch.equal(support, own_support)
    for name in ("reference_logprobs", "full_kl"):
        expected, got = (getattr(p, name)(samples(), support=support, **temperature) for p in (whole, pieces))
        assert expected.any()
        assert torch.allclose(got, expected, atol=1e-6), name


def test_a_step_in_pieces_moves_the_weights_as_a_whole_one_does() -> None:
    config = PPOHyperparameters(
        batch_size=12, mini_batch_size=6, ppo_epochs=2, learning_rate=1e-3, kl_penalty="full", entropy_coef=0.01
    )
    whole, pieces = pair(LEARNING["adapters"])
    for policy in (whole, pieces):
        PPOStepper(policy, None, config).step(ragged(12, 6), ragged(12, 8), [float(i % 3) for i in range(12)])
    for (name, one), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor [..., V] that any operation gives, gradients included."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            # [H, V] and [V, H] are weights.
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.shape[0] != 32:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("learning", ["adapters", "all of it"])
def test_no_tensor_has_more_rows_of_logits_than_a_piece(learning: str) -> None:
    whole, pieces = pair(LEARNING[learning])
    tokens = len(samples().cells)
    seen = []
    for policy in (whole, pieces):
        with LargestLogits() as largest:
            outputs = policy(samples())
            (outputs.logprobs.sum() + outputs.entropy.sum()).backward()
            if policy.has_adapters:
                policy.reference_logprobs(samples())
                policy.full_kl(samples())
        seen.append(largest.rows)
    assert seen == [tokens, ROWS]


def test_a_model_that_caps_its_logits_is_not_taken_apart() -> None:
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    assert config.final_logit_softcapping
    capped = Policy(add_lora(Gemma2ForCausalLM(config), LORA), logits_mib=LIMIT)
    assert not capped.in_pieces(10_000)
    for make in ARCHITECTURES.values():
        assert Policy(make(), logits_mib=LIMIT).in_pieces(10_000)


def test_no_graph_is_recorded_of_a_pass_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(*_: Any) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(Graphs, "run", recorded)
    whole, pieces = pair(LEARNING["adapters"])
    finder = BatchSizeFinder(12)
    with pytest.raises(AssertionError, match="recorded"):
        Evaluator(whole, GenerationSettings(), finder, full_kl=False, record=True).evaluate(samples())
    stepper = PPOStepper(pieces, None, PPOHyperparameters(batch_size=12, mini_batch_size=12, ppo_epochs=1))
    stepper._engine.draw_from(1.0, record=True)
    stepper._evaluator = Evaluator(pieces, GenerationSettings(), finder, full_kl=False, record=True)
    stepper.step(ragged(12, 6), ragged(12, 8), [0.0, 1.0] * 6)
