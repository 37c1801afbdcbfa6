"""The arithmetic of the experiment with rounds of ranking."""

import pytest

from benchmarks.ranking.loop_experiment import choose, pooled


def test_the_pair_with_the_greatest_kl_within_10_percent_is_chosen() -> None:
    one = {5: 1.0, 10: 2.0, 15: 4.0}
    assert choose(one, {5: 1.05, 10: 2.2, 15: 5.0}) == (10, 10)
    assert choose(one, {5: 0.5, 10: 3.7, 15: 9.0}) == (15, 10)
    with pytest.raises(ValueError, match="no two checkpoints have a KL within 10%"):
        choose(one, {5: 0.5})


def test_a_prompts_seeds_are_averaged_before_prompts_are_drawn() -> None:
    mean, (low, high) = pooled([[1.0, 0.0], [0.0, 1.0]])
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    mean, (low, high) = pooled([[1.0, 0.0], [1.0, 0.0]])
    assert (mean, low, high) == (0.5, 0.0, 1.0)
