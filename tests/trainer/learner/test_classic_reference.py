"""The classic trainer's recorded runs, reproduced through the public step."""

import copy

import pytest
import torch

from harness.classic_ppo import CASES, KEY_BIAS, Recording

# Adam divides a gradient by its size, so an entry whose gradient is nearly zero moves by the sign of its rounding
# error: with other instructions, the classic trainer's own weights end up 6e-4 elsewhere. What a step computes is
# therefore compared from the recorded weights before it, and weights from the start.


@pytest.fixture(params=CASES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


@pytest.mark.usefixtures("layout")
def test_every_intermediate_and_the_permutations_are_those_of_the_classic_trainer(recording: Recording) -> None:
    stepper = recording.stepper()
    for step, recorded in enumerate(recording.case["steps"]):
        if step > 0:
            recording.restore_weights(stepper, step - 1)
        result = recording.run_step(stepper, step)
        assert result.minibatch_permutations == recorded["minibatch_permutations"]
        for name, difference in recording.intermediate_differences(result, step).items():
            assert difference < 1e-5, f"{name} of step {step}"


@pytest.mark.usefixtures("layout")
def test_every_statistic_and_the_kl_coefficient_are_those_of_the_classic_trainer(recording: Recording) -> None:
    stepper = recording.stepper()
    for step, recorded in enumerate(recording.case["steps"]):
        if step > 0:
            recording.restore_weights(stepper, step - 1)
        assert stepper.kl_coef == pytest.approx(recorded["kl_coef_before"], rel=1e-7)
        statistics = recording.run_step(stepper, step).statistics
        for name, value in recorded["stats"].items():
            assert statistics[name] == pytest.approx(value, rel=1e-5, abs=5e-6), f"{name} of step {step}"
        assert stepper.kl_coef == pytest.approx(recorded["kl_coef_after"], rel=1e-7)


def test_weights_after_three_steps_are_those_of_the_classic_trainer(recording: Recording, layout: str) -> None:
    stepper = recording.stepper()
    for step in range(3):
        recording.run_step(stepper, step)
    # A step of Adam moves a weight by the learning rate, however small its gradient was. Packed, tokens add up in
    # another order than the classic trainer's.
    scale = max(1.0, stepper.config.learning_rate / 1e-3) * (10 if layout == "packed" else 1)
    for name, distances in recording.weight_distances(stepper, 2).items():
        if name.endswith(KEY_BIAS):
            continue
        assert distances.max() < 1e-4 * scale, name
        assert (distances < 1e-5 * scale).float().mean() > 0.999, name


def test_a_step_goes_on_from_saved_state_as_if_it_had_never_stopped(recording: Recording) -> None:
    straight = recording.stepper()
    recording.run_step(straight, 0)
    weights = copy.deepcopy(straight.policy.state_dict())
    state = copy.deepcopy(straight.state_dict())
    expected = recording.run_step(straight, 1)

    resumed = recording.stepper()
    resumed.policy.load_state_dict(weights)
    resumed.load_state_dict(state)
    result = recording.run_step(resumed, 1)

    assert result.statistics == expected.statistics
    for name, weight in straight.policy.state_dict().items():
        assert torch.equal(weight, resumed.policy.state_dict()[name]), name
