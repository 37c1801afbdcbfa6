import pytest
import torch
from torch.distributions import Categorical

from trainer.ppo import distributions

LOGITS = torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_entropy_are_those_of_the_tempered_categorical(temperature: float) -> None:
    logits = distributions.sampling_logits(LOGITS, temperature=temperature)
    expected = Categorical(logits=LOGITS / temperature)
    assert torch.allclose(distributions.token_logprobs(logits, TOKENS), expected.log_prob(TOKENS), atol=1e-6)
    assert torch.allclose(distributions.entropy(logits), expected.entropy(), atol=1e-6)


def test_a_uniform_distribution_has_the_entropy_of_its_size() -> None:
    assert distributions.entropy(torch.zeros(5)).item() == pytest.approx(torch.tensor(5.0).log().item())


def test_truncated_distributions_are_renormalised_over_what_is_left() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    for settings, expected in (
        ({"top_k": 2}, [True, True, False, False]),
        ({"top_p": 0.7}, [True, True, False, False]),
        ({"top_p": 0.81}, [True, True, True, False]),
        ({"top_p": 0.01}, [True, False, False, False]),
        ({"top_k": 3, "top_p": 0.6}, [True, True, False, False]),
        ({}, [True, True, True, True]),
    ):
        assert distributions.truncation(logits, **settings).tolist() == expected, settings
    kept = distributions.sampling_logits(logits, support=distributions.truncation(logits, top_k=2))
    assert distributions.token_logprobs(kept, torch.tensor(0)).exp().item() == pytest.approx(0.5 / 0.8)
    assert distributions.entropy(kept).item() == pytest.approx(Categorical(torch.tensor([0.5, 0.3])).entropy().item())


def test_truncation_is_that_of_the_transformers_library() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    rows = LOGITS.reshape(-1, 11)
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(6)(None, rows)).isfinite()
    assert torch.equal(distributions.truncation(rows, top_k=6, top_p=0.8), expected)
