"""Before and after: hand-worked numbers, and what must not change them."""

import json
import math

import numpy as np
import pytest

from plaudit.report.evaluation import Answers, compare, distinct, mean_ci95, perplexity, sequence_kl, summary


def answers(
    rewards, texts=None, logprobs=None, reference_logprobs=None, plain_reference_logprobs=None, token_counts=None
) -> Answers:
    n = len(rewards)
    return Answers(
        texts=tuple(texts or [f"answer {i}" for i in range(n)]),
        rewards=tuple(rewards),
        logprobs=tuple(logprobs or [-1.0] * n),
        reference_logprobs=tuple(reference_logprobs or [-1.0] * n),
        plain_reference_logprobs=tuple(plain_reference_logprobs or reference_logprobs or [-1.0] * n),
        token_counts=tuple(token_counts or [1] * n),
    )


def test_perplexity_weighs_tokens_not_responses():
    # Two tokens of probability 1/2 and one of 1/8: (2 * 2 * 8) ** (1/3) = 32 ** (1/3).
    logprobs = [2 * math.log(1 / 2), math.log(1 / 8)]
    assert perplexity(logprobs, [2, 1]) == pytest.approx(32 ** (1 / 3))


def test_kl_is_the_mean_over_responses_of_the_summed_log_ratio():
    assert sequence_kl([-1.0, -2.0], [-2.0, -5.0]) == pytest.approx((1.0 + 3.0) / 2)


def test_kl_of_a_policy_to_itself_is_zero():
    assert sequence_kl([-3.2, -1.7], [-3.2, -1.7]) == 0


def test_distinct_responses_ignore_white_space_at_the_ends():
    assert distinct([" good.", "good. ", "bad.", "good"]) == 3


def test_the_interval_of_two_values_spans_them():
    # Of two draws from {0, 1}, a quarter are both 0 and a quarter both 1: more than 2.5 % at either end.
    assert mean_ci95([0.0, 1.0]) == (0.0, 1.0)


def test_the_interval_of_a_constant_is_that_constant():
    assert mean_ci95([1.5] * 20) == (1.5, 1.5)


def test_the_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(1000)
    low, high = mean_ci95(values.tolist())
    assert low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    draw = np.random.default_rng(2)
    intervals = [mean_ci95(draw.exponential(1.0, 100).tolist(), resamples=1000) for _ in range(300)]
    assert 0.90 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.98


def test_shifting_and_scaling_the_values_shifts_and_scales_the_interval():
    values = np.random.default_rng(3).normal(size=50)
    low, high = mean_ci95(values.tolist())
    assert mean_ci95((2 * values + 5).tolist()) == pytest.approx((2 * low + 5, 2 * high + 5))


def test_summary_by_hand():
    result = summary([1.0, 2.0, 6.0])
    assert (result.mean, result.median) == (3.0, 2.0)
    assert result.ci95[0] <= 3.0 <= result.ci95[1]


def test_pairing_sees_a_small_gain_that_the_separate_intervals_hide():
    before = np.random.default_rng(4).normal(0.0, 3.0, 100)
    result = compare(answers(before), answers(before + 0.1))
    assert result.reward.before.ci95[1] > result.reward.after.ci95[0]
    assert result.reward.difference.mean == pytest.approx(0.1)
    assert result.reward.difference.ci95 == pytest.approx((0.1, 0.1))


def test_the_difference_is_after_minus_before():
    assert compare(answers([1.0, 2.0]), answers([4.0, 3.0])).reward.difference.mean == 2.0


def test_kl_and_perplexity_come_from_the_right_policy():
    before = answers([0.0, 0.0], logprobs=[-2.0, -2.0], reference_logprobs=[-2.0, -2.0], token_counts=[2, 2])
    after = answers([0.0, 0.0], logprobs=[-1.0, -1.0], reference_logprobs=[-4.0, -2.0], token_counts=[2, 2])
    result = compare(before, after)
    assert result.kl == 2.0
    assert result.perplexity.before == pytest.approx(math.e)
    assert result.perplexity.after == pytest.approx(math.exp(1.5))
    assert result.perplexity.ratio == pytest.approx(math.exp(0.5))


def test_a_sampling_temperature_changes_the_kl_but_not_the_perplexity():
    plain = {"plain_reference_logprobs": [-2.0, -2.0], "token_counts": [2, 2]}
    after = answers([0.0, 0.0], logprobs=[-0.5, -0.5], reference_logprobs=[-1.5, -1.5], **plain)
    result = compare(answers([0.0, 0.0], **plain), after)
    assert result.kl == 1.0
    assert result.perplexity.after == pytest.approx(math.e)


def test_the_json_has_exactly_the_documented_fields():
    result = compare(answers([0.0, 1.0], texts=["a", "a"]), answers([1.0, 2.0]))
    document = json.loads(json.dumps(result.to_dict()))
    assert set(document) == {"n", "reward", "kl", "perplexity", "distinct_responses"}
    assert set(document["reward"]) == {"before", "after", "difference"}
    assert set(document["reward"]["before"]) == set(document["reward"]["after"]) == {"mean", "median", "ci95"}
    assert set(document["reward"]["difference"]) == {"mean", "ci95"}
    assert document["n"] == 2
    assert document["distinct_responses"] == {"before": 1, "after": 2}
    assert set(document["perplexity"]) == {"before", "after"}
    assert len(document["reward"]["difference"]["ci95"]) == 2


def test_answers_to_different_prompts_are_not_compared():
    with pytest.raises(ValueError, match="2 answers before and 3 after"):
        compare(answers([0.0, 1.0]), answers([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="as many in every field"):
        answers([0.0, 1.0], token_counts=[1])
