"""The step: what moves weights and what must not. Padding, order and grouping are no part of a sample's numbers."""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.small_step import (
    CONFIG,
    QUERIES,
    RESPONSES,
    SCORES,
    make_policy,
    make_stepper,
    rollout_of,
    same,
    weights,
)
from harness.tiny_models import ARCHITECTURES, tiny_gpt2
from plaudit.errors import ConfigError
from plaudit.learner.adam import learning_rate_factor
from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.stepper import PPOStepper, StepResult
from plaudit.policy.adapters import add_lora
from plaudit.policy.model import Policy
from plaudit.policy.samples import Samples
from plaudit.ppo.distributions import sampling_logits, unpack
from plaudit.settings.policy import GenerationSettings, LoraSettings


def test_at_the_first_mini_batch_the_ratio_is_1_and_at_the_start_the_kl_is_0() -> None:
    stepper = PPOStepper(Policy(add_lora(tiny_gpt2(), LoraSettings(r=4, dropout=0.5))), None, CONFIG)
    statistics = stepper.step(QUERIES, RESPONSES, SCORES).statistics
    assert statistics["ppo/policy/ratio_drift"] < 1e-5
    assert statistics["objective/kl"] == 0.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_raise_the_probability_of_what_scored_well(architecture: str) -> None:
    config = replace(CONFIG, learning_rate=1e-2, mini_batch_size=4, ppo_epochs=4, init_kl_coef=0.0)
    stepper = PPOStepper(make_policy(architecture), None, config)
    samples = Samples.from_lists(QUERIES[:2] * 2, [[20, 21], [20, 21], [40, 41], [40, 41]], pad_token_id=0)
    before = stepper.evaluate(samples).logprobs.sum(1)
    for _ in range(3):
        stepper.update(stepper.evaluate(samples).with_scores(torch.tensor([1.0, 1.0, -1.0, -1.0])))
    change = stepper.evaluate(samples).logprobs.sum(1) - before
    assert change[:2].min() > 0 > change[2:].max()


def test_frozen_weights_never_move() -> None:
    stepper = make_stepper()
    frozen = {n: p.detach().clone() for n, p in stepper.policy.named_parameters() if not p.requires_grad}
    stepper.step(QUERIES, RESPONSES, SCORES)
    assert all(torch.equal(p, frozen[n]) for n, p in stepper.policy.named_parameters() if n in frozen)


# Defect 2: `max_grad_norm` clipped the first optimizer step only, since its parameters were an iterator.
def test_every_optimizer_step_sees_a_clipped_gradient() -> None:
    stepper = make_stepper(replace(CONFIG, max_grad_norm=1e-3))
    norms = []

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    stepper.optimizer.register_step_pre_hook(record)
    result = stepper.step(QUERIES, RESPONSES, SCORES)
    assert len(norms) == 4
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)
    assert result.statistics["ppo/grad_norm"] > 1e-2, "the statistic is the norm before clipping"


# Defect 3: a skipped mini-batch still moved the weights by momentum, and inf * 0 made them NaN.
@pytest.mark.parametrize("gap", [5.0, 1000.0])
def test_a_skipped_mini_batch_moves_no_weight_even_when_the_ratio_overflows(gap: float) -> None:
    stepper = make_stepper()
    stepper.step(QUERIES, RESPONSES, SCORES)
    rollout = rollout_of(stepper)
    far = replace(rollout, logprobs=rollout.logprobs - gap)
    before = weights(stepper)
    with pytest.warns(UserWarning, match="mini-batch skipped"):
        statistics = stepper.update(far).statistics
    assert same(weights(stepper), before)
    assert statistics["ppo/skipped"] == 1.0
    assert statistics["ppo/loss/total"] == 0.0


def test_a_skipped_mini_batch_leaves_the_others_of_its_group_their_say() -> None:
    config = replace(CONFIG, gradient_accumulation_steps=2, ppo_epochs=1)
    orders = [[0, 1, 2, 3]]
    stepper = make_stepper(config)
    rollout = rollout_of(stepper)
    far = rollout.logprobs.clone()
    far[2:] -= 50
    before = weights(stepper)
    with pytest.warns(UserWarning, match="mini-batch skipped"):
        statistics = stepper.update(replace(rollout, logprobs=far), orders).statistics
    assert statistics["ppo/skipped"] == 0.5
    assert not same(weights(stepper), before)


def test_a_non_finite_loss_stops_before_it_reaches_a_weight_and_names_its_samples() -> None:
    stepper = make_stepper()
    rollout = rollout_of(stepper)
    values = rollout.values.clone()
    values[2, 0] = torch.nan
    before = weights(stepper)
    # Whitening spreads one NaN over all advantages, so the first mini-batch already shows it.
    with pytest.raises(NonFiniteUpdate, match=r"loss is nan in step 0, epoch 0, samples \[3, 1\]") as caught:
        stepper.update(replace(rollout, values=values), [[3, 1, 2, 0], [0, 1, 2, 3]])
    assert same(weights(stepper), before)
    assert caught.value.samples.response_ids.tolist() == [[28, 29, 30, 0, 0], [22, 23, 24, 25, 26]]


def test_a_non_finite_gradient_stops_before_it_reaches_a_weight() -> None:
    stepper = make_stepper()
    stepper.policy.v_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before = weights(stepper)
    with pytest.raises(NonFiniteUpdate, match="gradient norm is"):
        stepper.step(QUERIES, RESPONSES, SCORES)
    assert same(weights(stepper), before)
    assert all(p.grad is None for p in stepper.policy.parameters())


# Defect 4: training forwards ran in eval mode.
def test_updates_run_in_train_mode_and_evaluation_in_eval_mode() -> None:
    stepper = make_stepper()
    modes = []
    stepper.policy.language_model.transformer.h[0].register_forward_pre_hook(lambda m, _: modes.append(m.training))
    rollout = rollout_of(stepper)
    assert set(modes) == {False}
    modes.clear()
    stepper.update(rollout)
    assert modes == [True] * 4
    assert not stepper.policy.training


# Defect 10: the optimizer, the KL coefficient, the running moments and the shuffling were lost.
def test_a_resumed_stepper_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = replace(CONFIG, use_score_scaling=True, lr_schedule="cosine", lr_warmup_steps=1)
    straight = make_stepper(config, total_steps=6, seed=7)
    for _ in range(2):
        straight.step(QUERIES, RESPONSES, SCORES)
    torch.save({"stepper": straight.state_dict(), "policy": straight.policy.state_dict()}, tmp_path / "state.pt")
    expected = [straight.step(QUERIES, RESPONSES, SCORES).statistics for _ in range(2)]

    resumed = make_stepper(config, total_steps=6, seed=8)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.policy.load_state_dict(state["policy"])
    resumed.load_state_dict(state["stepper"])
    assert [resumed.step(QUERIES, RESPONSES, SCORES).statistics for _ in range(2)] == expected
    assert same(weights(resumed), weights(straight))
    assert resumed.kl_coef == straight.kl_coef


def test_a_resumed_stepper_keeps_its_own_way_to_compute(tmp_path: Path) -> None:
    """A checkpoint of a CPU goes on with a GPU's kernels, and the other way round."""
    straight, resumed = make_stepper(), make_stepper()
    straight.step(QUERIES, RESPONSES, SCORES)
    resumed.optimizer.param_groups[0]["fused"] = True
    resumed.load_state_dict(straight.state_dict())
    assert resumed.optimizer.param_groups[0]["fused"] is True


# Defect 11: temperature and truncation missing from the log-probabilities made the KL negative.
@pytest.mark.parametrize(
    "generation",
    [
        GenerationSettings(temperature=0.5),
        GenerationSettings(top_k=20),
        GenerationSettings(temperature=1.3, top_k=50, top_p=0.9),
    ],
)
def test_the_kl_of_samples_is_the_kl_of_the_distribution_they_came_from(
    generation: GenerationSettings,
) -> None:
    count = 4000
    config = replace(CONFIG, batch_size=count, mini_batch_size=1000, kl_penalty="full")
    stepper = PPOStepper(make_policy(), None, config, generation=generation)
    one = Samples.from_lists([QUERIES[0]], [[0]], pad_token_id=0)
    options = {"temperature": generation.temperature}
    support = stepper.policy.support(one, top_k=generation.top_k, top_p=generation.top_p, **options)
    with torch.no_grad():
        logits = stepper.policy.language_model(torch.tensor([QUERIES[0]])).logits[0, -1]
    kept = None if support is None else unpack(support[0, 0], logits.shape[-1])
    probabilities = sampling_logits(logits, temperature=generation.temperature, support=kept).softmax(-1)
    # What the padding token adds to the support of `one` has probability in no row: it is not sampled below.
    if support is not None:
        probabilities[0] = 0.0
    tokens = torch.multinomial(probabilities, count, replacement=True, generator=torch.Generator().manual_seed(0))
    evaluation = stepper.evaluate(Samples.from_lists([QUERIES[0]] * count, tokens.unsqueeze(1).tolist(), 0))
    differences = evaluation.logprobs - evaluation.ref_logprobs
    assert evaluation.full_kl is not None
    error = differences.std() / math.sqrt(count)
    assert abs(differences.mean() - evaluation.full_kl.mean()) < 4 * error
    assert evaluation.full_kl.min() > 0
    frequency = (tokens == tokens[0]).double().mean()
    assert evaluation.logprobs[0, 0].exp().item() == pytest.approx(frequency.item(), rel=0.2)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(4)), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_order_grouping_and_padding_change_no_samples_numbers(order: list[int], rows: int, padding: int) -> None:
    """`rows` at once, in another order, beside a sample that needs more padding."""
    plain = make_stepper(replace(CONFIG, batch_size=4, mini_batch_size=4))
    expected = rollout_of(plain)
    long = [[1] * (4 + padding)], [[2] * (5 + padding)]
    other = make_stepper(replace(CONFIG, batch_size=4, mini_batch_size=rows))
    samples = Samples.from_lists(
        [QUERIES[i] for i in order] + long[0], [RESPONSES[i] for i in order] + long[1], pad_token_id=9
    )
    evaluation = other.evaluate(samples)
    for place, row in enumerate(order):
        width = len(RESPONSES[row])
        for name in ("logprobs", "values", "ref_logprobs"):
            own = getattr(evaluation, name)[place]
            assert torch.allclose(own[:width], getattr(expected, name)[row, :width], atol=1e-5), name
            assert not own[width:].any()


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)))
def test_a_step_on_a_permuted_batch_is_the_same_step(order: list[int]) -> None:
    straight, permuted = make_stepper(), make_stepper()
    epochs = [[0, 1, 2, 3], [2, 3, 1, 0]]
    places = [order.index(i) for i in range(4)]
    expected = straight.step(QUERIES, RESPONSES, SCORES, epochs)
    result = permuted.step(
        [QUERIES[i] for i in order],
        [RESPONSES[i] for i in order],
        [SCORES[i] for i in order],
        [[places[i] for i in epoch] for epoch in epochs],
    )
    for name in ("advantages", "returns", "rewards", "kls"):
        assert torch.allclose(getattr(result, name), getattr(expected, name)[order], atol=1e-5), name
    for name, value in expected.statistics.items():
        assert result.statistics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_accumulated_mini_batches_of_equal_length_make_the_gradient_of_the_whole() -> None:
    queries, responses = [[5, 6], [7, 8], [9, 10], [11, 12]], [[20, 21], [22, 23], [24, 25], [26, 27]]
    whole = make_stepper(replace(CONFIG, mini_batch_size=4, ppo_epochs=1))
    parts = make_stepper(replace(CONFIG, mini_batch_size=1, gradient_accumulation_steps=4, ppo_epochs=1))
    for stepper in (whole, parts):
        stepper.optimizer = torch.optim.SGD(
            [{"params": [p for p in stepper.policy.parameters() if p.requires_grad], "lr": 1.0, "initial_lr": 1.0}]
        )
        stepper.step(queries, responses, SCORES, [[0, 1, 2, 3]])
    for name, weight in weights(whole).items():
        assert torch.allclose(weight, weights(parts)[name], atol=1e-6), name


def test_early_stopping_ends_after_the_first_epoch_above_one_and_a_half_times_the_target() -> None:
    config = replace(CONFIG, learning_rate=0.01, mini_batch_size=4)
    orders = [[0, 1, 2, 3]] * 6

    def step(**changes: Any) -> StepResult:
        return make_stepper(replace(config, **changes)).step(QUERIES, RESPONSES, SCORES, orders)

    # With one mini-batch an epoch, the mean over n epochs is 1/n of the sum of their KLs.
    sums = [0.0, *(epochs * step(ppo_epochs=epochs).statistics["ppo/policy/policykl"] for epochs in range(1, 5))]
    first, second, third, fourth = (after - before for before, after in itertools.pairwise(sums))
    assert first < second < third < 0.9 * fourth

    def epochs_until(target: float) -> int:
        return len(step(ppo_epochs=6, early_stopping=True, target_kl=target).minibatch_permutations)

    assert epochs_until(third / 1.5 * 0.99) == 3
    assert epochs_until(third / 1.5 * 1.01) == 4


def test_an_entropy_bonus_spreads_the_distribution() -> None:
    def entropy_after(coefficient: float) -> float:
        config = replace(CONFIG, entropy_coef=coefficient, ppo_epochs=1, mini_batch_size=4, learning_rate=1e-2)
        # Cold, so that there is entropy to gain: at temperature 1 a random model is close to uniform.
        stepper = make_stepper(config, generation=GenerationSettings(temperature=0.05))
        for _ in range(3):
            stepper.step(QUERIES, RESPONSES, [0.0, 0.0, 0.0, 0.0])
        with torch.no_grad():
            samples = Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)
            return stepper.policy(samples, temperature=0.05).entropy.sum().item()

    assert entropy_after(1.0) > entropy_after(0.0) + 0.1


# With log p - log ref = ln 2 on every token: k1 = 0.6931, k2 = 0.4805 / 2, k3 = 1/2 - 1 + 0.6931.
@pytest.mark.parametrize(("penalty", "kl"), [("kl", 0.693147), ("abs", 0.693147), ("mse", 0.240227), ("k3", 0.193147)])
def test_each_penalty_takes_its_share_of_every_tokens_reward(penalty: Any, kl: float) -> None:
    stepper = make_stepper(replace(CONFIG, kl_penalty=penalty, init_kl_coef=0.5))
    rollout = rollout_of(stepper)
    rollout = replace(rollout, ref_logprobs=rollout.logprobs - math.log(2))
    result = stepper.update(rollout)
    torch.testing.assert_close(result.kls[result.mask], torch.full((11,), kl), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.non_score_rewards[result.mask], torch.full((11,), -kl / 2), atol=1e-5, rtol=0)


def test_the_value_head_learns_at_its_own_rate() -> None:
    stepper = make_stepper(replace(CONFIG, learning_rate=1e-12, value_head_learning_rate=1e-2, ppo_epochs=1))
    before = weights(stepper)
    stepper.step(QUERIES, RESPONSES, SCORES)
    moved = {name: (p - before[name]).abs().max().item() for name, p in weights(stepper).items()}
    assert moved["v_head.bias"] > 1e-3
    assert max(change for name, change in moved.items() if "lora" in name) < 1e-10


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    assert [learning_rate_factor(i, "constant", warmup_steps=3) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [learning_rate_factor(i, "linear", total_steps=4) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = [learning_rate_factor(i, "cosine", total_steps=4) for i in range(5)]
    assert cosine == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0])
    with pytest.raises(ConfigError, match="lr_schedule=linear needs to know the number of steps"):
        make_stepper(replace(CONFIG, lr_schedule="linear"))


def test_the_schedule_reaches_the_optimizer_and_the_statistics() -> None:
    stepper = make_stepper(replace(CONFIG, lr_schedule="linear"), total_steps=2)
    rates = [stepper.step(QUERIES, RESPONSES, SCORES).statistics["ppo/learning_rate"] for _ in range(2)]
    assert rates == pytest.approx([1e-3, 5e-4])


def test_what_is_no_step_is_refused_with_the_numbers_that_clash() -> None:
    stepper = make_stepper()
    before = weights(stepper)
    with pytest.raises(ValueError, match="3 samples in a step with batch_size=4"):
        stepper.step(QUERIES[:3], RESPONSES[:3], SCORES[:3])
    with pytest.raises(ValueError, match="scores must be finite"):
        stepper.step(QUERIES, RESPONSES, [1.0, math.nan, 0.0, 0.0])
    with pytest.raises(ValueError, match="is not a permutation of 4 samples"):
        stepper.step(QUERIES, RESPONSES, SCORES, [[0, 1, 1, 2], [0, 1, 2, 3]])
    assert same(weights(stepper), before)


def test_scores_may_be_floats_or_tensors_of_any_shape_that_is_one_number() -> None:
    expected = make_stepper().step(QUERIES, RESPONSES, SCORES).statistics
    for scores in (torch.tensor(SCORES), [torch.tensor([score]) for score in SCORES]):
        assert make_stepper().step(QUERIES, RESPONSES, scores).statistics == expected


def test_a_reference_that_was_handed_over_is_frozen_and_used() -> None:
    policy, reference = Policy(tiny_gpt2(0)), copy.deepcopy(tiny_gpt2(1))
    stepper = PPOStepper(policy, reference, CONFIG)
    result = stepper.step(QUERIES, RESPONSES, SCORES)
    with torch.no_grad():
        expected = Policy(tiny_gpt2(1))(Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)).logprobs
    assert torch.allclose(result.ref_logprobs, expected, atol=1e-6)
    assert not any(p.requires_grad for p in reference.parameters())
