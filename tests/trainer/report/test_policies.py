"""Figures of policies with intervals, by hand where that is possible."""

import math

import numpy as np
import pytest

from plaudit.report.evaluation import Answers
from plaudit.report.policies import judged, median_ci95, policy_figures, weighted_ci95


def answers(rewards: list[float], logprobs: list[float], counts: list[int]) -> Answers:
    n = len(rewards)
    return Answers(
        texts=tuple(f"text {i % 2}" for i in range(n)),
        rewards=tuple(rewards),
        logprobs=tuple(logprobs),
        reference_logprobs=tuple(value - 1 for value in logprobs),
        plain_reference_logprobs=tuple(value - 1 for value in logprobs),
        token_counts=tuple(counts),
        judged={"other": tuple(-reward for reward in rewards)},
    )


def test_figures_by_hand() -> None:
    before = answers([0.0, 1.0, 2.0, 3.0], [-3.0] * 4, [2] * 4)
    after = answers([1.0, 1.0, 3.0, 2.0], [-5.0] * 4, [2] * 4)
    found = policy_figures("p", after, before)
    assert found.reward.mean.value == 1.75
    # Two wins, a tie and a loss; by the other judge the opposite.
    assert found.reward.win_rate is not None
    assert found.reward.win_rate.value == 0.625
    assert found.judges["other"].win_rate is not None
    assert found.judges["other"].win_rate.value == 0.375
    assert found.kl.value == 1
    assert found.kl.ci95 == (1, 1)
    assert found.perplexity.value == pytest.approx(math.exp(3))
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(math.exp(1))
    assert found.perplexity_ratio.ci95 == pytest.approx((math.exp(1), math.exp(1)))
    assert found.length.value == 2
    assert found.distinct_responses == 2


def test_the_policy_before_has_no_win_rate_and_no_ratio() -> None:
    found = policy_figures("p", answers([0.0, 1.0], [-3.0, -2.0], [2, 3]), None)
    assert found.reward.win_rate is None
    assert found.perplexity_ratio is None


def test_a_weighted_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = weighted_ci95(400, lambda weights: weights @ values / 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_an_interval_of_a_median_covers_it_and_a_constant_has_no_width() -> None:
    low, high = median_ci95(list(range(101)))
    assert 30 < low < 50 < high < 70
    assert median_ci95([2.0] * 5) == (2.0, 2.0)
    assert judged([2.0, 2.0], None).median.ci95 == (2.0, 2.0)
