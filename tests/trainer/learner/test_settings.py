"""Settings beyond the classic trainer's, in whole steps: their default is today's number, and no split changes them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from harness.small_step import CONFIG, QUERIES, RESPONSES, SCORES, make_stepper, rollout_of, same, weights
from plaudit.errors import ConfigError
from plaudit.learner.experience import make_experience
from plaudit.learner.stepper import PPOStepper
from plaudit.ppo.advantages import gae, length_adaptive_lambda
from plaudit.settings.ppo import PPOHyperparameters

SEQUENCE_SUM: dict[str, Any] = {"loss_aggregation": "sequence_sum", "loss_tokens": 6}
ORDERS = [[2, 0, 3, 1], [0, 1, 2, 3]]


def with_sgd(config: PPOHyperparameters) -> PPOStepper:
    """Weights that move by the gradient itself, which Adam would divide by its size."""
    stepper = make_stepper(config)
    learning = [p for p in stepper.policy.parameters() if p.requires_grad]
    stepper.optimizer = torch.optim.SGD([{"params": learning, "lr": 0.1, "initial_lr": 0.1}])
    return stepper


@pytest.mark.parametrize(
    "changes",
    [
        {"cliprange_upper": CONFIG.cliprange},
        {"value_lam": CONFIG.lam},
        {"dual_clip": 1e6},
        {"kl_loss": "k2", "kl_loss_weighted": False},
    ],
)
def test_a_setting_at_its_neutral_value_is_the_default_to_the_bit(changes: dict[str, Any]) -> None:
    default, neutral = make_stepper(), make_stepper(replace(CONFIG, **changes))
    for _ in range(2):
        expected = default.step(QUERIES, RESPONSES, SCORES, ORDERS).statistics
        assert neutral.step(QUERIES, RESPONSES, SCORES, ORDERS).statistics == expected
    assert same(weights(neutral), weights(default))


@pytest.mark.parametrize("changes", [{}, {"loss_aggregation": "sequence_mean", "kl_loss_coef": 0.5}, SEQUENCE_SUM])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_how_many_samples_go_through_the_model_at_once_changes_no_weight(
    changes: dict[str, Any], accumulated: int
) -> None:
    config = replace(
        CONFIG, mini_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated, entropy_coef=0.1, **changes
    )
    whole, parts = with_sgd(config), with_sgd(replace(config, micro_batch_size=1))
    expected = whole.step(QUERIES, RESPONSES, SCORES, ORDERS).statistics
    statistics = parts.step(QUERIES, RESPONSES, SCORES, ORDERS).statistics
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"loss_aggregation": "sequence_mean"}, SEQUENCE_SUM])
def test_accumulated_mini_batches_make_the_gradient_of_the_whole_whatever_the_lengths(changes: dict[str, Any]) -> None:
    """With a mean over tokens, they would only where all mini-batches have as many."""
    whole = with_sgd(replace(CONFIG, mini_batch_size=4, ppo_epochs=1, **changes))
    parts = with_sgd(replace(CONFIG, mini_batch_size=1, gradient_accumulation_steps=4, ppo_epochs=1, **changes))
    for stepper in (whole, parts):
        stepper.step(QUERIES, RESPONSES, SCORES, ORDERS)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-4, atol=1e-6)


def test_at_ratio_1_the_policy_loss_is_minus_the_aggregated_advantage() -> None:
    def step(**changes: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
        config = replace(CONFIG, mini_batch_size=4, ppo_epochs=1, entropy_coef=0.1, **changes)
        result = make_stepper(config).step(QUERIES, RESPONSES, SCORES, ORDERS)
        statistics = result.statistics
        assert statistics["ppo/loss/total"] != statistics["ppo/loss/policy"]
        return statistics["ppo/loss/policy"], result.advantages.sum(1), result.mask.sum(1)

    loss, sums, lengths = step()
    assert loss == pytest.approx(-sums.sum().item() / lengths.sum().item(), abs=1e-6)
    loss, sums, lengths = step(loss_aggregation="sequence_mean")
    assert loss == pytest.approx(-(sums / lengths).mean().item(), rel=1e-4)
    loss, sums, _ = step(**SEQUENCE_SUM)
    assert loss == pytest.approx(-(sums / 6).mean().item(), abs=1e-6)


def test_a_kl_term_adds_its_own_gradient_to_the_step_and_its_value_to_the_total() -> None:
    config = replace(CONFIG, mini_batch_size=4, ppo_epochs=1)
    without, with_kl = with_sgd(config), with_sgd(replace(config, kl_loss_coef=0.5, kl_loss="k2"))
    policy = make_stepper(config).policy
    rollout = rollout_of(without)
    mask = rollout.samples.mask
    distance = policy(rollout.samples).logprobs - rollout.ref_logprobs
    kl = (0.5 * distance.square())[mask].mean()
    kl.backward()

    before = without.update(rollout, ORDERS).statistics
    after = with_kl.update(rollout, ORDERS).statistics
    assert after["ppo/loss/kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert after["ppo/loss/total"] == pytest.approx(before["ppo/loss/total"] + 0.5 * kl.item(), rel=1e-4)
    assert "ppo/loss/kl" not in before
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert max(gradient.abs().max().item() for gradient in gradients.values()) > 1e-4
    for name, weight in weights(with_kl).items():
        if name in gradients:
            expected = 0.1 * 0.5 * gradients[name]
            torch.testing.assert_close(weights(without)[name] - weight, expected, rtol=1e-2, atol=1e-7)


def test_policy_and_value_head_have_lambdas_of_their_own() -> None:
    stepper = make_stepper()
    rollout = rollout_of(stepper)

    def experience(**changes: Any) -> Any:
        return make_experience(rollout, rollout.scores, replace(CONFIG, **changes), kl_coef=0.1)

    default, decoupled = experience(), experience(value_lam=1.0)
    assert torch.equal(decoupled.advantages, default.advantages)
    mask = rollout.samples.mask
    to_go = default.rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(decoupled.returns[mask], to_go[mask], msg="with lambda 1, returns are rewards to go")

    adaptive = experience(lam_alpha=0.5)
    lam = length_adaptive_lambda(rollout.samples.response_lengths, alpha=0.5)
    advantages, _ = gae(default.rewards, rollout.values, mask, gamma=1.0, lam=lam)
    assert torch.corrcoef(torch.stack([adaptive.advantages[mask], advantages[mask]]))[0, 1] == pytest.approx(1.0)
    assert torch.equal(adaptive.returns, default.returns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_clip": 1.0}, r"dual_clip=1.0 must be greater than 1"),
        ({"cliprange_upper": 0.0}, r"cliprange_upper=0.0 must be greater than 0"),
        ({"value_lam": 1.5}, r"value_lam=1.5 must lie between 0 and 1"),
        ({"loss_aggregation": "sequence_sum"}, r"loss_tokens=None with loss_aggregation=sequence_sum"),
        ({"kl_loss_coef": -1.0}, r"kl_loss_coef=-1.0 must be 0"),
        ({"kl_loss": "k1", "kl_loss_weighted": False}, r"kl_loss=k1 with kl_loss_weighted=False"),
        ({"loss_tokens": 16}, r"loss_tokens=16 with loss_aggregation=token_mean"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)
