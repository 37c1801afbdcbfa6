import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo import losses


def test_policy_loss_by_hand() -> None:
    ratios, advantages = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    # A gain is worth no more than the clip allows; a loss counts in full.
    assert losses.policy_losses(ratios, advantages, cliprange=0.2).tolist() == pytest.approx(
        [-1.2, 1.5, -0.5, 0.8, -2.2]
    )
    assert losses.policy_clipped(ratios, advantages, cliprange=0.2).tolist() == [True, False, False, True, False]


def test_a_clipped_token_has_no_gradient_and_an_unclipped_one_has_minus_its_advantage() -> None:
    ratios = torch.tensor([1.5, 1.1], requires_grad=True)
    losses.policy_losses(ratios, torch.tensor([2.0, 2.0]), cliprange=0.2).sum().backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [0.0, -2.0]


@given(st.floats(0.01, 5), st.floats(-3, 3), st.floats(0.01, 0.9))
def test_the_clip_only_ever_raises_the_policy_loss(ratio: float, advantage: float, cliprange: float) -> None:
    loss = losses.policy_losses(torch.tensor(ratio), torch.tensor(advantage), cliprange=cliprange)
    assert loss >= torch.tensor(-advantage) * torch.tensor(ratio)


def test_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([1.0, 0.1, 3.0]), torch.zeros(3), torch.tensor([2.0, 2.0, 0.0])
    # Clipped to 0.2, 0.1 and 0.2: the larger error of clipped and unclipped counts, halved.
    assert losses.value_losses(values, old, returns, cliprange=0.2).tolist() == pytest.approx(
        [0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 3.0**2]
    )
    assert losses.value_clipped(values, old, returns, cliprange=0.2).tolist() == [True, False, False]


def test_within_the_clip_the_value_loss_is_half_the_squared_error() -> None:
    values, returns = torch.tensor([0.1, -0.1]), torch.tensor([1.0, -1.0])
    assert torch.equal(
        losses.value_losses(values, torch.zeros(2), returns, cliprange=0.2), 0.5 * (values - returns).square()
    )


def test_clip_higher_lets_a_gain_grow_to_the_upper_range_and_leaves_the_lower_one() -> None:
    ratios, advantages = torch.tensor([1.25, 1.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0, -1.0])
    loss = losses.policy_losses(ratios, advantages, cliprange=0.2, upper=0.28)
    assert loss.tolist() == pytest.approx([-1.25, -1.28, -0.5, 0.8])
    assert losses.policy_clipped(ratios, advantages, cliprange=0.2, upper=0.28).tolist() == [False, True, False, True]
    # The default upper range is the lower one, to the bit.
    ratios = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 2
    same = losses.policy_losses(ratios, ratios - 1, cliprange=0.2, upper=0.2)
    assert torch.equal(same, losses.policy_losses(ratios, ratios - 1, cliprange=0.2))


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone() -> None:
    ratios = torch.tensor([5.0, 2.0, 0.5, 5.0], requires_grad=True)
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    loss = losses.policy_losses(ratios, advantages, cliprange=0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, 2.0, 0.8, -1.2])
    loss.sum().backward()
    assert ratios.grad is not None
    assert ratios.grad.tolist() == [0.0, 1.0, 0.0, 0.0]
    clipped = losses.policy_clipped(ratios, advantages, cliprange=0.2, dual_clip=3.0)
    assert clipped.tolist() == [True, False, True, True]


@given(st.floats(0.01, 8), st.floats(-3, 3), st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.floats(1.01, 5))
def test_a_token_is_called_clipped_exactly_where_it_has_no_gradient(
    ratio: float, advantage: float, lower: float, upper: float, dual: float
) -> None:
    clips = {"cliprange": lower, "upper": upper, "dual_clip": dual}
    ratios, advantages = torch.tensor(ratio, dtype=torch.float64, requires_grad=True), torch.tensor(advantage).double()
    losses.policy_losses(ratios, advantages, **clips).backward()
    at_a_bound = min(abs(ratio - bound) for bound in (1 - lower, 1 + upper, dual)) < 1e-6
    if abs(advantage) > 1e-3 and not at_a_bound:
        assert ratios.grad is not None
        assert bool(losses.policy_clipped(ratios, advantages, **clips)) == (ratios.grad.item() == 0)
