import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from plaudit.ppo.masked import masked_mean, masked_sum, masked_var, scale, whiten

VALUES = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_mean_and_unbiased_variance_of_1_2_6_are_3_and_7() -> None:
    assert masked_mean(VALUES, MASK).item() == 3.0
    assert masked_var(VALUES, MASK).item() == 7.0


def test_mean_along_a_dimension_counts_each_row_by_its_own_length() -> None:
    assert masked_mean(VALUES, MASK, dim=1).tolist() == [1.5, 6.0]
    assert masked_sum(VALUES, MASK, dim=1).tolist() == [3.0, 6.0]


def test_nothing_under_the_mask_matters_not_even_nan() -> None:
    poisoned = VALUES.masked_fill(~MASK, torch.nan)
    for function in (masked_mean, masked_var, masked_sum, whiten, scale):
        assert torch.equal(function(poisoned, MASK), function(VALUES, MASK))


def test_one_token_varies_by_nothing_and_whitens_to_zero() -> None:
    values, mask = torch.tensor([[5.0, 9.0]]), torch.tensor([[True, False]])
    assert masked_var(values, mask).item() == 0.0
    assert whiten(values, mask).tolist() == [[0.0, 0.0]]
    assert scale(values, mask).tolist() == [[5.0, 0.0]]


def test_an_empty_mask_gives_zero_and_not_nan() -> None:
    assert masked_mean(VALUES, torch.zeros_like(MASK)).item() == 0.0


@given(arrays("float64", (4, 6), elements=st.floats(-100, 100)), arrays("bool", (4, 6)))
def test_whitening_gives_mean_0_and_variance_1_and_scaling_keeps_the_mean(
    values: NDArray[np.float64], mask: NDArray[np.bool_]
) -> None:
    x, m = torch.from_numpy(values), torch.from_numpy(mask)
    if m.sum() < 2 or masked_var(x, m) < 1e-3:
        return
    whitened, scaled = whiten(x, m), scale(x, m)
    assert masked_mean(whitened, m).item() == pytest.approx(0.0, abs=1e-6)
    assert masked_var(whitened, m).item() == pytest.approx(1.0, rel=1e-4)
    assert masked_mean(scaled, m).item() == pytest.approx(masked_mean(x, m).item(), abs=1e-6)
    assert not whitened[~m].any()
    assert not scaled[~m].any()
