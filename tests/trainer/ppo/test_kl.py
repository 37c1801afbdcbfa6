import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo import kl


def test_estimators_of_a_difference_of_log_2() -> None:
    logprobs, reference = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl.k1(logprobs, reference).item() == pytest.approx(math.log(2))
    assert kl.k1(reference, logprobs).item() == pytest.approx(-math.log(2))
    assert kl.absolute(reference, logprobs).item() == pytest.approx(math.log(2))
    assert kl.k2(logprobs, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.k3(logprobs, reference).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_the_full_kl_on_average_over_the_policy() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = kl.full_kl(policy, reference)
    for estimator in (kl.k1, kl.k3):
        assert (policy.exp() * estimator(policy, reference)).sum().item() == pytest.approx(exact.item())


def test_full_kl_is_that_of_torch_and_ignores_tokens_that_cannot_be_sampled() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 3, 4, 7).log_softmax(-1)
    expected = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(kl.full_kl(policy, reference), expected, atol=1e-6)
    support = torch.tensor([True] * 3 + [False] * 4)
    truncated = policy.masked_fill(~support, -torch.inf).log_softmax(-1)
    assert kl.full_kl(truncated, truncated).eq(0).all()


@given(st.floats(-5, 5))
def test_k3_is_never_negative_and_zero_only_without_a_difference(difference: float) -> None:
    value = kl.k3(torch.tensor(difference, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)).item()
    assert value >= 0
    assert (value < 1e-12) == (abs(difference) < 2e-6)


@pytest.mark.parametrize("name", kl.ESTIMATORS)
def test_every_estimator_is_zero_where_policy_and_reference_agree(name: str) -> None:
    logprobs = torch.tensor([-0.1, -3.0])
    assert kl.ESTIMATORS[name](logprobs, logprobs).eq(0).all()


def test_the_controller_steers_by_at_most_a_fifth_of_the_share_of_the_horizon() -> None:
    def after(observed: float) -> float:
        return kl.adapt_coefficient(0.2, observed, target=6.0, horizon=10_000.0, samples=100)

    assert after(6.0) == 0.2
    assert after(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.01))
    assert after(600.0) == pytest.approx(0.2 * (1 + 0.2 * 0.01))
    assert after(-600.0) == pytest.approx(0.2 * (1 - 0.2 * 0.01))


def distributions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the policy with a gradient, and log-distributions of the policy that sampled and of the reference."""
    draw = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw[0].requires_grad_(), draw[1].log_softmax(-1), draw[2].log_softmax(-1)


def gradient_of_terms(
    logits: torch.Tensor, old: torch.Tensor, reference: torch.Tensor, estimator: str, *, weighted: bool
) -> torch.Tensor:
    """The gradient in expectation over tokens of the policy that sampled: each token of the vocabulary, weighted."""
    terms = kl.loss_terms(logits.log_softmax(-1), old, reference, estimator=estimator, weighted=weighted)
    return torch.autograd.grad((old.exp() * terms).sum(), logits)[0]


@pytest.mark.parametrize("estimator", kl.LOSS_ESTIMATORS)
def test_the_gradient_of_a_weighted_kl_term_is_that_of_the_exact_kl_however_far_the_policy_has_moved(
    estimator: str,
) -> None:
    logits, old, reference = distributions()
    exact = torch.autograd.grad(kl.full_kl(logits.log_softmax(-1), reference), logits)[0]
    assert torch.allclose(gradient_of_terms(logits, old, reference, estimator, weighted=True), exact)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_value_of_a_weighted_k1_or_k3_term_is_the_exact_kl_on_average(estimator: str) -> None:
    logits, old, reference = distributions()
    terms = kl.loss_terms(logits.log_softmax(-1), old, reference, estimator=estimator, weighted=True)
    assert torch.allclose((old.exp() * terms).sum(), kl.full_kl(logits.log_softmax(-1), reference))


def test_without_its_weight_k2_has_the_gradient_of_the_kl_and_k3_that_of_the_reversed_kl() -> None:
    logits, _, reference = distributions()
    old = logits.detach().log_softmax(-1)
    exact = torch.autograd.grad(kl.full_kl(logits.log_softmax(-1), reference), logits)[0]
    reversed_kl = torch.autograd.grad(kl.full_kl(reference, logits.log_softmax(-1)), logits)[0]
    assert torch.allclose(gradient_of_terms(logits, old, reference, "k2", weighted=False), exact)
    assert torch.allclose(gradient_of_terms(logits, old, reference, "k3", weighted=False), reversed_kl)
    # What a k1 term would do, and why it is refused.
    k1 = (old.exp() * kl.k1(logits.log_softmax(-1), reference)).sum()
    assert torch.autograd.grad(k1, logits)[0].abs().max() < 1e-12
    with pytest.raises(ValueError, match="zero in expectation"):
        gradient_of_terms(logits, old, reference, "k1", weighted=False)


@pytest.mark.parametrize(("penalty", "share"), [("kl", 1.0), ("full", 0.0)])
def test_as_a_reward_k1_has_the_gradient_of_the_kl_and_the_full_kl_none_at_the_token_itself(
    penalty: str, share: float
) -> None:
    """REINFORCE in expectation over the tokens of one state: each token's log-probability times its penalty."""
    logits, _, reference = distributions()
    policy = logits.log_softmax(-1)
    exact = torch.autograd.grad(kl.full_kl(policy, reference), logits, retain_graph=True)[0]
    fixed = policy.detach()
    penalties = kl.k1(fixed, reference) if penalty == "kl" else kl.full_kl(fixed, reference).expand_as(fixed)
    learned = torch.autograd.grad((fixed.exp() * policy * penalties).sum(), logits)[0]
    assert torch.allclose(learned, share * exact)
    assert exact.abs().max() > 0.01


def test_an_estimator_without_a_loss_term_is_named() -> None:
    with pytest.raises(ValueError, match="full is none of k1, k2, k3"):
        kl.loss_terms(torch.zeros(1), torch.zeros(1), torch.zeros(1), estimator="full", weighted=True)
