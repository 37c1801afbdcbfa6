"""Several processes of a classic program take one step together."""

import pytest
import torch

from harness.classic_processes import steps, steps_in_processes


# Defect 9: each process whitened its own advantages, and statistics were not those of the whole batch.
def test_two_processes_with_half_a_batch_each_step_as_one_with_the_whole() -> None:
    expected, weights = steps(1)
    first, second = steps_in_processes(2)
    assert [entry.keys() for entry in first[0]] == [entry.keys() for entry in expected]
    for own, other, one in zip(first[0], second[0], expected, strict=True):
        assert own == other, "both know the whole batch"
        for name, value in one.items():
            assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, weight in weights.items():
        assert torch.equal(first[1][name], second[1][name]), name
        if not name.endswith("c_attn.bias"):  # of attention's keys the gradient is rounding alone
            assert (first[1][name] - weight).abs().max() < 1e-4, name
