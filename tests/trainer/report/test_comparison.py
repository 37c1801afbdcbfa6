"""Win rates and Bradley-Terry scores against hand-worked numbers, identities, and the package choix."""

import math
import warnings

import numpy as np
import pytest

from plaudit.report.comparison import Judgement, NoMaximum, bradley_terry, comparisons, strengths, win_rate


def judged(prompt: str, *ranks: int, policies: tuple[str, ...] = ("before", "after")) -> Judgement:
    return Judgement(prompt, policies, ranks)


def test_a_win_counts_1_a_tie_a_half_and_a_loss_0() -> None:
    table = comparisons([judged("a", 2, 1), judged("b", 1, 1), judged("c", 1, 2), judged("d", 2, 1)])
    rate = win_rate(table, "after", "before")
    assert rate.prompts == 4
    assert rate.mean == (1 + 0.5 + 0 + 1) / 4
    assert (rate.wins, rate.ties, rate.losses) == (0.5, 0.25, 0.25)


def test_a_prompt_that_three_people_ranked_weighs_as_much_as_one_that_one_person_ranked() -> None:
    table = comparisons([judged("a", 2, 1), judged("a", 2, 1), judged("a", 1, 2), judged("b", 1, 2)])
    assert win_rate(table, "after", "before").mean == pytest.approx((2 / 3 + 0) / 2)


def test_the_two_sides_win_rates_add_up_to_1() -> None:
    draw = np.random.default_rng(0)
    table = comparisons([judged(str(i), *draw.integers(1, 3, 2).tolist()) for i in range(50)])
    there, back = win_rate(table, "after", "before"), win_rate(table, "before", "after")
    assert there.mean + back.mean == pytest.approx(1)
    assert (there.wins, there.ties) == pytest.approx((back.losses, back.ties))
    assert there.ci95[0] == pytest.approx(1 - back.ci95[1])


def test_the_interval_of_a_coin_is_that_of_the_binomial_distribution() -> None:
    table = comparisons([judged(str(i), 1 + i % 2, 2 - i % 2) for i in range(400)])
    low, high = win_rate(table, "after", "before").ci95
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)


def test_rankings_by_more_people_make_no_prompts() -> None:
    once = [judged(str(i), 1 + i % 2, 2 - i % 2) for i in range(40)]
    assert win_rate(comparisons(once * 5), "after", "before") == win_rate(comparisons(once), "after", "before")


def test_answers_of_one_policy_are_not_compared_with_each_other() -> None:
    table = comparisons([judged("a", 1, 2, 3, policies=("p", "p", "q"))])
    assert win_rate(table, "p", "q").mean == 1


def test_policies_that_nobody_ranked_are_named() -> None:
    with pytest.raises(ValueError, match="nobody ranked an answer of 'best'; there are answers of after, before"):
        win_rate(comparisons([judged("a", 1, 2)]), "best", "before")
    apart = [judged("a", 1, 2, policies=("p", "q")), judged("b", 1, 2, policies=("q", "r"))]
    with pytest.raises(ValueError, match="'p' and 'r' have no prompt in common"):
        win_rate(comparisons(apart), "p", "r")


def test_two_policies_have_the_closed_form() -> None:
    better, worse = bradley_terry(np.array([[0, 30], [10, 0]]))
    assert better - worse == pytest.approx(math.log(3))
    assert better + worse == 0


def test_three_policies_whose_wins_follow_the_model_get_its_scores_back() -> None:
    true = np.array([0.7, -0.1, -0.6])
    wins = 1000 / (1 + np.exp(-(true[:, None] - true[None, :])))
    assert bradley_terry(wins) == pytest.approx(true, abs=1e-9)


def test_more_of_the_same_wins_change_no_score() -> None:
    wins = np.array([[0, 5, 3], [2, 0, 4], [1, 3, 0]])
    assert bradley_terry(wins * 7) == pytest.approx(bradley_terry(wins))


@pytest.mark.parametrize("seed", range(5))
def test_the_scores_are_those_of_choix_ties_included(seed: int) -> None:
    with warnings.catch_warnings():
        # At its own import it escapes nothing in its docstrings.
        warnings.simplefilter("ignore")
        import choix
    draw = np.random.default_rng(seed)
    n = 3 + seed % 3
    wins = draw.integers(1, 20, (n, n)).astype(float)
    ties = np.triu(draw.integers(0, 6, (n, n)), 1)
    halves = 2 * wins + ties + ties.T  # choix takes whole wins: everything twice, a tie once each way
    data = [(i, j) for i in range(n) for j in range(n) if i != j for _ in range(int(halves[i, j]))]
    expected = choix.opt_pairwise(n, data, tol=1e-12)
    assert bradley_terry(halves / 2) == pytest.approx(expected - expected.mean(), abs=1e-6)
    assert choix.mm_pairwise(n, data, tol=1e-12) == pytest.approx(bradley_terry(halves / 2), abs=1e-6)


@pytest.mark.parametrize(
    "wins",
    [
        pytest.param([[0, 3, 2], [0, 0, 1], [0, 1, 0]], id="one never lost"),
        pytest.param([[0, 3, 0], [2, 0, 0], [0, 0, 0]], id="one never played"),
        pytest.param([[0, 4], [0, 0]], id="two, and one never lost"),
    ],
)
def test_policies_without_finite_scores_are_refused(wins: list[list[float]]) -> None:
    with pytest.raises(NoMaximum, match="no finite score"):
        bradley_terry(np.array(wins))


def test_strengths_come_best_first_with_intervals_around_them() -> None:
    draw = np.random.default_rng(1)
    noise = draw.gumbel(size=(300, 3)) + np.array([0.0, 0.8, -0.5])
    names = ("sft", "ppo", "old")
    ranks = 1 + np.argsort(np.argsort(-noise, axis=1), axis=1)
    table = comparisons([judged(str(i), *row.tolist(), policies=names) for i, row in enumerate(ranks)])
    found = strengths(table, resamples=200)
    assert [strength.policy for strength in found.policies] == ["ppo", "sft", "old"]
    assert found.undefined == 0
    for strength, true in zip(found.policies, (0.7, -0.1, -0.6), strict=True):
        assert strength.ci95[0] < strength.score < strength.ci95[1]
        assert strength.score == pytest.approx(true, abs=0.2)


def test_resamples_without_finite_scores_are_counted() -> None:
    few = [judged("a", 1, 2), judged("b", 2, 1), judged("c", 1, 2)]
    found = strengths(comparisons(few), resamples=500)
    # All three draws on one side: 1/27 for b alone, 8/27 for a and c.
    assert found.undefined / 500 == pytest.approx(9 / 27, abs=0.07)


def test_ranks_that_are_not_as_many_as_the_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 'a' has 2 policies and 1 ranks"):
        judged("a", 1)
