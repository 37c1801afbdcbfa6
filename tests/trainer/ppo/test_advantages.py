import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo.advantages import gae, length_adaptive_lambda
from plaudit.ppo.masked import scale


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 1, 3])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    draw = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    return draw[0], draw[1], mask


def test_two_tokens_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 50.0]]), torch.tensor([[0.5, 0.25, 50.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]]), gamma=0.5, lam=0.5)
    # delta_1 = 2 - 0.25, delta_0 = 1 + 0.5 * 0.25 - 0.5, A_0 = delta_0 + 0.25 * delta_1
    assert advantages.tolist() == [[0.625 + 0.25 * 1.75, 1.75, 0.0]]
    assert returns.tolist() == [[0.625 + 0.25 * 1.75 + 0.5, 2.0, 0.0]]


def test_gae_with_lambda_1_is_return_minus_value() -> None:
    rewards, values, mask = example()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.masked_fill(~mask, 0.0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns[mask], to_go[mask])
    assert torch.allclose(advantages[mask], (to_go - values)[mask])


def test_gae_with_lambda_0_is_the_one_step_error() -> None:
    rewards, values, mask = example()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([values.masked_fill(~mask, 0.0)[:, 1:], torch.zeros(3, 1)], dim=1)
    assert torch.allclose(advantages[mask], (rewards + 0.9 * following - values)[mask])


def test_perfect_values_leave_no_advantage() -> None:
    rewards, _, mask = example()
    rewards = rewards.masked_fill(~mask, 0.0)
    values = rewards.flip(1).cumsum(1).flip(1)
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert advantages.abs().max() < 1e-12


@given(st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_padding_does_not_change_the_advantages(columns: int, gamma: float, lam: float) -> None:
    rewards, values, mask = example()
    garbage = torch.full((3, columns), 1e6, dtype=torch.float64)
    wide_rewards, wide_values = (torch.cat([t, garbage], 1) for t in (rewards, values))
    wide_mask = torch.cat([mask, torch.zeros(3, columns, dtype=torch.bool)], 1)
    for narrow, wide in zip(
        gae(rewards, values, mask, gamma=gamma, lam=lam),
        gae(wide_rewards, wide_values, wide_mask, gamma=gamma, lam=lam),
        strict=True,
    ):
        assert torch.equal(wide[:, :5], narrow)
        assert not wide[:, 5:].any()


@given(st.permutations(range(3)))
def test_permuting_the_batch_permutes_the_advantages(order: list[int]) -> None:
    rewards, values, mask = example()
    straight, _ = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    permuted, _ = gae(rewards[order], values[order], mask[order], gamma=0.99, lam=0.95)
    assert torch.equal(permuted, straight[order])


# Defect 8: whitening by `x - mean` left -mean on padding, which GAE then carried into the response.
def test_whitened_rewards_are_zero_on_padding_and_so_are_the_advantages() -> None:
    rewards, values, mask = example()
    scaled = scale(rewards + 3.0, mask)
    assert not scaled[~mask].any()
    padded, _ = gae(scaled, values, mask, gamma=1.0, lam=0.95)
    alone, _ = gae(scaled[1:2, :1], values[1:2, :1], mask[1:2, :1], gamma=1.0, lam=0.95)
    assert torch.equal(padded[1:2, :1], alone)


def test_each_row_may_have_a_lambda_of_its_own() -> None:
    rewards, values, mask = example()
    lams = [0.0, 0.5, 1.0]
    together, _ = gae(rewards, values, mask, gamma=0.9, lam=torch.tensor(lams, dtype=torch.float64))
    for row, lam in enumerate(lams):
        alone, _ = gae(rewards, values, mask, gamma=0.9, lam=lam)
        assert torch.allclose(together[row], alone[row])


def test_the_length_adaptive_lambda_looks_ahead_over_the_same_share_of_every_response() -> None:
    lengths = torch.tensor([40, 400, 10, 20, 1])
    lams = length_adaptive_lambda(lengths, alpha=0.05)
    assert lams.tolist() == pytest.approx([0.5, 0.95, 0.0, 0.0, 0.0])
    horizon = 1 / (1 - lams[:2])
    assert horizon.tolist() == pytest.approx([0.05 * 40, 0.05 * 400])
