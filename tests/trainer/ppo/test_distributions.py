import math

import pytest
import torch
from torch.distributions import Categorical

from plaudit.ppo import distributions

LOGITS = torch.randn(12, 11, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(11, (12,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_entropy_are_those_of_the_tempered_categorical(temperature: float) -> None:
    logits = distributions.sampling_logits(LOGITS, temperature=temperature)
    expected = Categorical(logits=LOGITS / temperature)
    logprobs, entropy = distributions.token_statistics(logits, TOKENS, entropy=True)
    assert entropy is not None
    assert torch.allclose(logprobs, expected.log_prob(TOKENS), atol=1e-6)
    assert torch.allclose(entropy, expected.entropy(), atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 5, 12])
def test_gradients_are_those_of_the_categorical_however_many_rows_are_taken_at_once(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = [slice(start, start + rows_at_once) for start in range(0, len(LOGITS), rows_at_once)]
    monkeypatch.setattr(distributions, "_few_rows", lambda logits: chunks)
    support = LOGITS > -1.0
    support.scatter_(-1, TOKENS.unsqueeze(-1), True)
    weights = torch.randn(2, len(LOGITS), generator=torch.Generator().manual_seed(2))
    ours, theirs = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
    logprobs, entropy = distributions.token_statistics(
        distributions.sampling_logits(ours, support=support), TOKENS, entropy=True
    )
    assert entropy is not None
    (logprobs * weights[0] + entropy * weights[1]).sum().backward()
    log_distribution = theirs.masked_fill(~support, -torch.inf).log_softmax(-1)
    expected_entropy = -(log_distribution.exp() * log_distribution.masked_fill(~support, 0.0)).sum(-1)
    (
        log_distribution.gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1) * weights[0] + expected_entropy * weights[1]
    ).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_a_uniform_distribution_has_the_entropy_of_its_size() -> None:
    _, entropy = distributions.token_statistics(torch.zeros(1, 5), torch.tensor([0]), entropy=True)
    assert entropy is not None
    assert entropy.item() == pytest.approx(torch.tensor(5.0).log().item())


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
    kept = distributions.sampling_logits(logits, support=distributions.truncation(logits, top_k=2)).unsqueeze(0)
    logprobs, entropy = distributions.token_statistics(kept, torch.tensor([0]), entropy=True)
    assert logprobs.exp().item() == pytest.approx(0.5 / 0.8)
    assert entropy is not None
    assert entropy.item() == pytest.approx(Categorical(torch.tensor([0.5, 0.3])).entropy().item())


@pytest.mark.parametrize("vocabulary", [1, 8, 13])
def test_a_support_is_packed_eight_tokens_to_a_byte(vocabulary: int) -> None:
    support = torch.rand(2, 3, vocabulary, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = distributions.pack(support)
    assert packed.shape == (2, 3, math.ceil(vocabulary / 8))
    assert torch.equal(distributions.unpack(packed, vocabulary), support)
    assert distributions.pack(torch.arange(9) % 8 == 1).tolist() == [2, 0]
    assert distributions.unpack(torch.tensor([255, 255], dtype=torch.uint8), 13).tolist() == [True] * 13


def test_truncation_is_that_of_the_transformers_library() -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    rows = LOGITS.reshape(-1, 11)
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(6)(None, rows)).isfinite()
    assert torch.equal(distributions.truncation(rows, top_k=6, top_p=0.8), expected)
