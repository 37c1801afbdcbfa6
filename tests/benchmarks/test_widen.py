"""The widened policy is the small policy's function."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from benchmarks.learning.widen import LAYERS, TIMES, wide_policy, widen
from harness.tiny_models import tiny_gpt2
from plaudit.policy.pretrained import load_causal_lm

IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [1, 1, 4, 8, 2, 6]])


@torch.no_grad()
def logprobs(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.double().log_softmax(-1)


@pytest.mark.parametrize(("times", "layers"), [(1, 5), (3, 2), (2, 4)])
def test_a_widened_model_has_the_same_log_probabilities(times: int, layers: int) -> None:
    small = tiny_gpt2().eval()
    assert small.config.n_layer == 2
    wide = widen(small, times=times, layers=layers)
    assert wide.config.n_embd == times * small.config.n_embd
    assert len(wide.transformer.h) == layers
    distance = (logprobs(wide, IDS) - logprobs(small, IDS)).abs().max().item()
    assert distance < 2e-6


def test_every_weight_of_a_further_block_matters_once_its_projections_learn() -> None:
    """The block adds nothing, but is a whole block: it changes the output as soon as a projection is not zero."""
    small = tiny_gpt2().eval()
    wide = widen(small, times=1, layers=3)
    torch.nn.init.normal_(wide.transformer.h[2].mlp.c_proj.weight, std=0.1)
    assert (logprobs(wide, IDS) - logprobs(small, IDS)).abs().max().item() > 1e-2


@pytest.mark.slow
def test_the_embedded_policy_in_the_shape_of_gpt2_small(tmp_path: Path) -> None:
    embedded = Path("models/imdb-gpt2-mini")
    wide = GPT2LMHeadModel.from_pretrained(wide_policy(embedded, tmp_path / "wide")).eval()
    config = wide.config
    assert (config.n_embd, config.n_head, config.n_layer) == (192 * TIMES, 3 * TIMES, LAYERS) == (768, 12, 12)
    small = load_causal_lm(embedded).float().eval()
    assert (logprobs(wide, IDS) - logprobs(small, IDS)).abs().max().item() < 1e-4
