import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plaudit.ppo import group_advantages
from plaudit.ppo.group_advantages import dr_grpo, grpo, rloo

GROUPS = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])


def test_two_groups_by_hand() -> None:
    assert rloo(GROUPS)[0].tolist() == [1 - 8 / 2, 2 - 7 / 2, 6 - 3 / 2]
    assert dr_grpo(GROUPS).tolist() == [[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]
    std = math.sqrt((4 + 1 + 9) / 2)
    assert grpo(GROUPS)[0].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std], rel=1e-5)


@given(st.integers(2, 6), st.integers(0, 2**16))
def test_rloo_is_the_reward_less_the_mean_of_the_others(n: int, seed: int) -> None:
    rewards = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = rloo(rewards)
    for group in range(3):
        for i in range(n):
            others = torch.cat([rewards[group, :i], rewards[group, i + 1 :]])
            assert advantages[group, i] == pytest.approx((rewards[group, i] - others.mean()).item())


@pytest.mark.parametrize("name", group_advantages.ESTIMATORS)
@given(reward=st.floats(-50, 50, width=32), n=st.integers(2, 7))
def test_a_group_of_equal_rewards_has_advantages_of_exactly_0(name: str, reward: float, n: int) -> None:
    assert not group_advantages.ESTIMATORS[name](torch.full((2, n), reward)).any()


@pytest.mark.parametrize("name", group_advantages.ESTIMATORS)
def test_what_all_responses_of_a_prompt_gain_alike_changes_nothing(name: str) -> None:
    shifted = GROUPS + torch.tensor([[10.0], [-3.0]])
    torch.testing.assert_close(group_advantages.ESTIMATORS[name](shifted), group_advantages.ESTIMATORS[name](GROUPS))


def test_the_estimators_differ_by_a_factor_of_each_group() -> None:
    torch.testing.assert_close(rloo(GROUPS), 3 / 2 * dr_grpo(GROUPS))
    torch.testing.assert_close(grpo(GROUPS), dr_grpo(GROUPS) / GROUPS.std(1, keepdim=True), rtol=1e-5, atol=0)
    assert grpo(GROUPS).std(1).tolist() == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("name", group_advantages.ESTIMATORS)
def test_one_response_has_nothing_to_be_compared_with(name: str) -> None:
    with pytest.raises(ValueError, match="a group needs at least 2 responses"):
        group_advantages.ESTIMATORS[name](torch.zeros(4, 1))
