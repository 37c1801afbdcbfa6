"""Several responses to a prompt, and advantages without a critic, in whole steps."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.small_step import CONFIG, QUERIES, RESPONSES, SCORES, make_policy, same, weights
from plaudit.errors import ConfigError
from plaudit.learner.stepper import PPOStepper
from plaudit.parallel.processes import Processes
from plaudit.policy.model import Policy
from plaudit.ppo.group_advantages import ESTIMATORS
from plaudit.settings.policy import ModelSettings
from plaudit.settings.ppo import PPOConfig, PPOHyperparameters

GROUPS = [QUERIES[0], QUERIES[0], QUERIES[1], QUERIES[1]]
RLOO = replace(CONFIG, responses_per_prompt=2, advantage_estimator="rloo", init_kl_coef=0.0)


def make_stepper(config: PPOHyperparameters = RLOO, **options: Any) -> PPOStepper:
    return PPOStepper(make_policy(value_head=not config.critic_free), None, config, **options)


def test_every_token_has_the_score_less_the_mean_of_the_other_responses_to_its_prompt() -> None:
    result = make_stepper().step(GROUPS, RESPONSES, SCORES)
    expected = torch.tensor([1.0 + 2.0, -2.0 - 1.0, 0.5 - 3.0, 3.0 - 0.5])
    assert torch.equal(result.advantages, (expected.unsqueeze(1) * result.mask).float())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_kl_in_the_reward_is_part_of_what_is_compared(estimator: Any) -> None:
    config = replace(RLOO, advantage_estimator=estimator, init_kl_coef=0.5)
    result = make_stepper(config).step(GROUPS, RESPONSES, SCORES)
    of_responses = torch.tensor(SCORES) - 0.5 * result.kls.sum(1)
    expected = ESTIMATORS[estimator](of_responses.view(2, 2)).flatten()
    assert result.kls.abs().max() > 1e-3
    torch.testing.assert_close(result.advantages, expected.unsqueeze(1) * result.mask)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_prompt_whose_responses_score_alike_moves_no_weight(estimator: Any) -> None:
    stepper = make_stepper(replace(RLOO, advantage_estimator=estimator))
    before = weights(stepper)
    statistics = stepper.step(GROUPS, RESPONSES, [0.7, 0.7, -1.3, -1.3]).statistics
    assert statistics["ppo/grad_norm"] == 0.0
    assert same(weights(stepper), before)
    stepper.step(GROUPS, RESPONSES, SCORES)
    assert not same(weights(stepper), before)


def test_a_value_head_is_neither_made_nor_trained_nor_reported() -> None:
    stepper = make_stepper()
    assert stepper.policy.v_head is None
    assert not any("v_head" in name for name, _ in stepper.policy.named_parameters())
    result = stepper.step(GROUPS, RESPONSES, SCORES)
    assert not result.values.any()
    assert not result.returns.any()
    assert not [name for name in result.statistics if name.startswith(("ppo/val/", "ppo/returns/", "ppo/loss/value"))]
    assert result.statistics["ppo/policy/ratio_drift"] < 1e-5


def test_a_rate_for_the_value_head_is_of_no_consequence_without_one() -> None:
    plain, with_rate = make_stepper(), make_stepper(replace(RLOO, value_head_learning_rate=1.0))
    for stepper in (plain, with_rate):
        stepper.step(GROUPS, RESPONSES, SCORES, [[0, 1, 2, 3]] * 2)
    assert same(weights(with_rate), weights(plain))


def test_steps_without_a_critic_raise_the_probability_of_what_scored_well() -> None:
    stepper = make_stepper(replace(RLOO, learning_rate=1e-2, mini_batch_size=4, ppo_epochs=4))
    good, bad = [[20, 21], [40, 41]]
    for _ in range(3):
        result = stepper.step(GROUPS, [good, bad, good, bad], [1.0, -1.0, 1.0, -1.0])
    first, after = result.ref_logprobs.sum(1), result.logprobs.sum(1)
    assert (after - first)[[0, 2]].min() > 0 > (after - first)[[1, 3]].max()


def test_the_drawn_orders_keep_the_responses_to_a_prompt_together() -> None:
    config = replace(RLOO, batch_size=12, mini_batch_size=6, responses_per_prompt=3, ppo_epochs=8)
    stepper = make_stepper(config)
    orders = [stepper._order(epoch, None) for epoch in range(8)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(12))
        for minibatch in order.view(-1, 6):
            assert len(set((minibatch // 3).tolist())) == 2
    assert len({tuple(order.tolist()) for order in orders}) > 1


def test_a_given_order_that_splits_a_prompt_is_refused() -> None:
    stepper = make_stepper()
    before = weights(stepper)
    with pytest.raises(ValueError, match=r"has responses to one prompt, 2 consecutive samples, in two mini-batches"):
        stepper.step(GROUPS, RESPONSES, SCORES, [[0, 2, 1, 3]] * 2)
    stepper.step(GROUPS, RESPONSES, SCORES, [[3, 2, 0, 1]] * 2)
    assert not same(weights(stepper), before)


def test_a_resumed_stepper_goes_on_to_the_bit() -> None:
    straight, resumed = make_stepper(seed=3), make_stepper(seed=4)
    straight.step(GROUPS, RESPONSES, SCORES)
    resumed.policy.load_state_dict(straight.policy.state_dict())
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    expected = straight.step(GROUPS, RESPONSES, SCORES)
    result = resumed.step(GROUPS, RESPONSES, SCORES)
    assert result.statistics == expected.statistics
    assert result.minibatch_permutations == expected.minibatch_permutations
    assert same(weights(resumed), weights(straight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "rloo"}, "responses_per_prompt=2 or more, not 1"),
        ({"responses_per_prompt": 3}, "responses_per_prompt=3 does not divide mini_batch_size=2"),
        ({"value_lam": 1.0}, "value_lam=1.0 needs advantage_estimator=gae: advantage_estimator=grpo has no use for it"),
        ({"whiten_rewards": True}, "whiten_rewards=True needs advantage_estimator=gae"),
        ({"gamma": 0.9}, "gamma=0.9 needs advantage_estimator=gae"),
    ],
)
def test_settings_that_cannot_go_together_are_refused_with_their_values(changes: dict[str, Any], message: str) -> None:
    grouped = {"advantage_estimator": "grpo", "responses_per_prompt": 2}
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **(changes if len(changes.keys() & grouped.keys()) else grouped | changes))


def test_what_has_no_critic_is_refused_one() -> None:
    with pytest.raises(ConfigError, match=r"advantage_estimator=rloo needs a policy made with .*value_head=False"):
        PPOStepper(make_policy(), None, RLOO)
    with pytest.raises(ConfigError, match=r"advantage_estimator=gae needs a policy made with .*value_head=True"):
        PPOStepper(make_policy(value_head=False), None, CONFIG)
    with pytest.raises(ConfigError, match=r"leave out model.value_model=copy"):
        PPOConfig(ppo=RLOO, model=ModelSettings(separate_value_model=True))
    with pytest.raises(
        ConfigError, match="mini_batch_size=2, 1 prompts with 2 responses each, is less than 2 processes"
    ):
        make_stepper(processes=Processes(0, 2))


def test_a_policy_without_a_value_head_is_on_the_device_of_its_model() -> None:
    policy: Policy = make_policy(value_head=False)
    assert policy.device == torch.device("cpu")
