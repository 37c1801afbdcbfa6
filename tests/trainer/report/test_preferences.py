"""How well scores order answers: by hand."""

import math

import pytest

from plaudit.data.preferences import Pair, RankedPrompt
from plaudit.report.preferences import Bin, ceiling, length_bias, pair_agreement, ranking_figures

ROWS = [
    RankedPrompt(
        "A",
        "a",
        ["a", "bb", "ccc"],
        ["", "", ""],
        [Pair(0, 1, wins=2, losses=1, ties=0, target=2 / 3), Pair(0, 2, wins=0, losses=1, ties=0, target=0.0)],
    ),
    RankedPrompt("B", "b", ["xxxx", "y"], ["", ""], [Pair(0, 1, wins=1, losses=0, ties=2, target=2 / 3)]),
]
SCORES = [[1.0, 0.0, 2.0], [0.0, 0.0]]


def test_accuracy_and_calibration_of_two_prompts_by_hand() -> None:
    found = ranking_figures(ROWS, SCORES)
    # A: two of three people and one of one agree with the scores, 5/6; B: equal scores are right half of the time.
    assert found.accuracy == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert (found.prompts, found.pairs) == (2, 3)
    sure = 1 / (1 + math.exp(-1))
    even, likely = found.bins
    assert even == Bin(confidence=0.5, accuracy=1.0, share=0.5)
    assert (likely.confidence, likely.accuracy, likely.share) == (pytest.approx(sure), pytest.approx(5 / 6), 0.5)
    assert found.calibration_error == pytest.approx((0.5 + 5 / 6 - sure) / 2)
    low, high = found.accuracy_ci95
    assert (low, high) == (pytest.approx(0.5), pytest.approx(5 / 6))  # the means of two prompts lie between them


def test_a_scale_changes_how_sure_the_scores_are_and_not_what_they_say() -> None:
    plain = ranking_figures(ROWS, SCORES)
    scaled = ranking_figures(ROWS, [[10 * score for score in given] for given in SCORES], scale=10.0)
    assert scaled == plain


def test_length_by_hand() -> None:
    found = length_bias(ROWS, SCORES)
    # The better is longer in A's second pair (right) and in B (half right), shorter in A's first (two of three).
    assert found.better_is_longer == pytest.approx((1 / 2 + 1) / 2)
    assert found.accuracy_where_longer == pytest.approx((1 + 1 / 2) / 2)
    assert found.accuracy_where_shorter == pytest.approx(2 / 3)
    # Less their means, A has scores 0, -1, 1 and lengths -1, 0, 1; B has scores 0, 0 and lengths 1.5, -1.5.
    assert found.correlation == pytest.approx((1 / 3) / math.sqrt(2 / 3 * (2 / 3 + 2.25)))


def test_a_judge_that_counts_letters_is_found_out() -> None:
    rows = [
        RankedPrompt(
            f"{i}", f"{i}", ["long answer" * (i + 1), "short"], ["", ""], [Pair(0, 1, i % 2, 1 - i % 2, 0, i % 2)]
        )
        for i in range(40)
    ]
    found = length_bias(rows, [[float(len(answer)) for answer in row.answers] for row in rows])
    assert found.accuracy_where_longer == 1.0
    assert found.accuracy_where_shorter == 0.0
    assert found.correlation == pytest.approx(1.0)


def test_what_people_agree_on_is_how_much_is_possible() -> None:
    assert pair_agreement(ROWS) == pytest.approx(1 / 3)  # of three couples of people about A's first pair, one agrees
    assert pair_agreement(ROWS[1:]) is None  # one person alone told it apart
    # Right 9 times of 10: two agree with 0.81 + 0.01.
    assert ceiling(0.82) == pytest.approx(0.9)
    assert ceiling(1.0) == 1.0
    assert ceiling(0.3) == 0.5


def test_a_few_prompts_can_not_be_told_from_chance() -> None:
    right = Pair(0, 1, 1, 0, 0, 1.0)
    rows = [RankedPrompt(f"{i}", f"{i}", ["a", "b"], ["", ""], [right]) for i in range(5)]
    scores = [[1.0, 0.0]] * 5
    assert not ranking_figures(rows, scores).at_chance
    assert ranking_figures(rows[:4], scores[:4]).at_chance
    assert ranking_figures(rows, [[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2).at_chance
