"""A whole mini-batch's update in one go, as a GPU records it. Here the same code runs on the CPU, unrecorded."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

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
from harness.tiny_models import ARCHITECTURES
from plaudit.learner.graphs import FlatMinibatch, Graphs, UpdateGraphs
from plaudit.learner.minibatches import NonFiniteUpdate
from plaudit.learner.step_statistics import STATISTICS, measure
from plaudit.learner.stepper import PPOStepper, _can_record
from plaudit.parallel.processes import Processes
from plaudit.policy.samples import Samples
from plaudit.settings.policy import GenerationSettings
from plaudit.settings.ppo import PPOHyperparameters


def with_graphs(config: PPOHyperparameters = CONFIG, architecture: str = "gpt2", **options: Any) -> PPOStepper:
    stepper = PPOStepper(make_policy(architecture), None, config, **options)
    for group in stepper.optimizer.param_groups:
        group["fused"] = True  # what looks at `found_inf`
    engine = stepper._engine
    engine._updates = UpdateGraphs(engine.parameters(), engine._learn)
    evaluator = stepper._evaluator
    evaluator._graphs = Graphs(evaluator._forward_flat)
    return stepper


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.1, "entropy_coef": 0.01, "lr_schedule": "linear"}])
def test_steps_are_those_that_are_taken_one_call_at_a_time(architecture: str, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    plain = PPOStepper(make_policy(architecture), None, config, total_steps=3)
    graphed = with_graphs(config, architecture, total_steps=3)
    for _ in range(3):
        expected, got = plain.step(QUERIES, RESPONSES, SCORES), graphed.step(QUERIES, RESPONSES, SCORES)
        for name, value in expected.statistics.items():
            assert got.statistics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    before, after = weights(plain), weights(graphed)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)


def test_a_skipped_mini_batch_moves_no_weight_and_no_moment() -> None:
    graphed = with_graphs(replace(CONFIG, ratio_threshold=0.5))
    before = weights(graphed)
    with pytest.warns(UserWarning, match="mini-batch skipped"):
        statistics = graphed.step(QUERIES, RESPONSES, SCORES).statistics
    assert statistics["ppo/skipped"] == 1.0
    assert same(weights(graphed), before)
    assert all(float(state["step"]) == 0 for state in graphed.optimizer.state.values())


def test_a_non_finite_loss_moves_no_weight_and_names_its_samples() -> None:
    graphed = with_graphs(replace(CONFIG, ppo_epochs=1))
    before = weights(graphed)
    rollout = rollout_of(graphed)
    rollout = replace(rollout, values=rollout.values.index_fill(0, torch.tensor([2]), math.nan))
    with pytest.raises(NonFiniteUpdate, match="loss is nan"):
        graphed.update(rollout, [[0, 1, 2, 3]])
    assert same(weights(graphed), before)


def test_another_optimizer_updates_unrecorded_and_moves_no_weight_by_a_number_that_is_not_finite() -> None:
    stepper = with_graphs(replace(CONFIG, ppo_epochs=1))
    learning = [p for p in stepper.policy.parameters() if p.requires_grad]
    stepper.optimizer = torch.optim.SGD([{"params": learning, "lr": 1.0, "initial_lr": 1.0}])
    before, rollout = weights(stepper), rollout_of(stepper)
    values = rollout.values.index_fill(0, torch.tensor([2]), torch.nan)
    with pytest.raises(NonFiniteUpdate, match="loss is nan"):
        stepper.update(replace(rollout, values=values), [[0, 1, 2, 3]])
    assert same(weights(stepper), before)


def test_the_warm_up_before_a_recording_moves_no_weight() -> None:
    graphed = with_graphs()
    assert graphed._engine._updates is not None
    before = weights(graphed)
    samples = Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)
    ones = torch.ones_like(samples.response_ids, dtype=torch.float32)
    columns = dict.fromkeys(("logprobs", "values", "advantages", "returns"), ones)
    graphed._engine._updates._hold.fill_(1.0)
    graphed._engine._updates.run(FlatMinibatch.of(samples, torch.float32, **columns))
    assert same(weights(graphed), before)


def test_shapes_are_rounded_up_and_padding_counts_for_nothing() -> None:
    samples = Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)
    values = torch.randn(samples.mask.shape)
    flat = FlatMinibatch.of(samples, torch.float32, logprobs=values, values=values, advantages=values, returns=values)
    assert flat.given.arguments["input_ids"].shape == (8, 64)
    assert flat.mask.sum() == sum(map(len, RESPONSES))
    assert len(flat.mask) == 128
    assert torch.equal(flat.logprobs[flat.mask], values[samples.mask])
    copy = flat.clone()
    copy.copy_(flat)
    assert all(torch.equal(tensor, copy.tensors()[name]) for name, tensor in flat.tensors().items())


def test_every_statistic_has_its_name() -> None:
    stepper = make_stepper()
    samples = Samples.from_lists(QUERIES, RESPONSES, pad_token_id=0)
    ones = torch.ones_like(samples.response_ids, dtype=torch.float32)
    flat = FlatMinibatch.of(samples, torch.float32, logprobs=ones, values=ones, advantages=ones, returns=ones)
    assert tuple(measure(flat, stepper.policy.score(flat.given, flat.tokens), stepper.config)) == STATISTICS


def test_what_a_graph_cannot_tell_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, generation = make_policy(), GenerationSettings()
    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    monkeypatch.setattr("plaudit.learner.stepper.skips_on_found_inf", lambda _: True)
    assert policy.packs

    def records(**changes: Any) -> bool:
        return _can_record(policy, replace(CONFIG, **changes), generation, Processes())

    assert records()
    assert records(cliprange_upper=0.3, dual_clip=3.0, value_lam=1.0, lam_alpha=0.1)
    assert not records(loss_aggregation="sequence_mean")
    assert not records(kl_loss_coef=0.1)
    assert records(responses_per_prompt=2)
    assert not records(responses_per_prompt=2, advantage_estimator="rloo")
    assert not records(loss_aggregation="sequence_sum", loss_tokens=16)
