"""The classic trainer's recorded runs, reproduced through `PPOTrainer.step` of the classic API."""

import pytest

from harness.classic_ppo import CASES, KEY_BIAS, Recording

# One of the recorded runs moves so fast that its KL estimate is negative, which the trainer remarks on.
pytestmark = pytest.mark.filterwarnings("ignore:KL is:UserWarning")


@pytest.fixture(params=CASES)
def recording(request: pytest.FixtureRequest) -> Recording:
    return Recording(request.param)


def test_statistics_tensors_and_kl_coefficient_are_those_of_the_classic_trainer(recording: Recording) -> None:
    trainer = recording.classic_trainer()
    for step, recorded in enumerate(recording.case["steps"]):
        if step > 0:
            recording.restore_weights(trainer.stepper, step - 1)
        assert trainer.kl_ctl.value == pytest.approx(recorded["kl_coef_before"], rel=1e-7)
        statistics = recording.classic_step(trainer, step)
        for name, value in recorded["stats"].items():
            assert statistics[name] == pytest.approx(value, rel=1e-5, abs=5e-6), f"{name} of step {step}"
        assert trainer.kl_ctl.value == pytest.approx(recorded["kl_coef_after"], rel=1e-7)
        mask = recording.tensors[f"step{step}/mask"].bool()
        for name in ("logprobs", "ref_logprobs"):
            if f"step{step}/{name}" in recording.tensors:
                expected = recording.tensors[f"step{step}/{name}"]
                own = statistics[f"objective/{name}"]
                assert own.shape == expected.shape, name
                assert abs(own[mask] - expected[mask].numpy()).max() < 1e-5, name
                assert (own[~mask] == 0).all(), name
        kls = (recording.tensors[f"step{step}/kls"] * mask).sum(1)
        assert statistics["objective/kl_dist"] == pytest.approx(kls.numpy(), abs=1e-4)


def test_weights_after_three_steps_are_those_of_the_classic_trainer(recording: Recording) -> None:
    trainer = recording.classic_trainer()
    for step in range(3):
        recording.classic_step(trainer, step)
    scale = max(1.0, trainer.config.learning_rate / 1e-3)
    for name, distances in recording.weight_distances(trainer.stepper, 2).items():
        if name.endswith(KEY_BIAS):
            continue
        assert distances.max() < 1e-4 * scale, name
        assert (distances < 1e-5 * scale).float().mean() > 0.999, name
    moved = dict(trainer.model.named_parameters())
    assert all(moved[name].data_ptr() == p.data_ptr() for name, p in recording.weights(trainer.stepper).items())
