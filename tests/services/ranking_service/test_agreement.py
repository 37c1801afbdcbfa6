"""Statistics against hand-worked numbers and other people's packages."""

import math
import random
from collections import Counter

import choix
import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.annotators import Tasks, people_who_rank
from plaudit.ranking_service import agreement
from plaudit.ranking_service.agreement import Activity
from plaudit.wire.rankings import Estimate, dense

rankings = st.lists(st.integers(1, 4), min_size=2, max_size=6)


def as_matrix(tasks: Tasks) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """Annotators by answers, NaN where somebody said nothing."""
    columns = [
        [task[f"p{p}"][answer] if f"p{p}" in task else math.nan for p in range(10)]
        for task in tasks
        for answer in range(len(next(iter(task.values()))))
    ]
    return np.array(columns).T


def test_two_people_who_agree_about_two_pairs_of_three() -> None:
    # a > b > c against a > c > b: they agree about (a, b) and (a, c).
    assert agreement.agreeing_pairs([1, 2, 3], [1, 3, 2]) == (2, 3)


def test_a_tie_agrees_with_a_tie_alone() -> None:
    assert agreement.agreeing_pairs([1, 1], [2, 2]) == (1, 1)
    assert agreement.agreeing_pairs([1, 1], [1, 2]) == (0, 1)


def test_chance_without_ties_is_a_half_and_with_ties_alone_is_certain() -> None:
    assert agreement.chance_agreement(0, 0) == 0.5
    assert agreement.chance_agreement(1, 1) == 1.0
    assert agreement.chance_agreement(0.5, 0.2) == pytest.approx(0.5 * 0.2 + 0.5 * 0.8 / 2)


def test_chance_is_what_people_give_who_answer_at_random() -> None:
    draw = random.Random(1)
    tasks = [{p: dense([draw.randrange(3) for _ in range(4)]) for p in ("a", "b")} for _ in range(4000)]
    rates = {p: agreement.tie_rate(task[p] for task in tasks) or 0.0 for p in ("a", "b")}
    counts = [agreement.pair_counts(task, rates) for task in tasks]
    observed = sum(c.agreed for c in counts) / sum(c.compared for c in counts)
    expected = sum(c.by_chance for c in counts) / sum(c.compared for c in counts)
    assert observed == pytest.approx(expected, abs=0.01)


@given(st.integers(2, 6).flatmap(lambda n: st.tuples(*[st.lists(st.integers(1, 4), min_size=n, max_size=n)] * 2)))
def test_tau_b_is_scipys(pair: tuple[list[int], list[int]]) -> None:
    one, other = pair
    ours = agreement.tau_b(one, other)
    theirs = stats.kendalltau(one, other).statistic
    if ours is None:
        assert math.isnan(theirs)
    else:
        assert ours == pytest.approx(theirs, abs=1e-12)


@given(rankings)
def test_tau_b_of_a_ranking_with_itself_is_1_and_with_its_reverse_minus_1(ranks: list[int]) -> None:
    reverse = [5 - rank for rank in ranks]
    if len(set(ranks)) > 1:
        assert agreement.tau_b(ranks, ranks) == pytest.approx(1)
        assert agreement.tau_b(ranks, reverse) == pytest.approx(-1)
    else:
        assert agreement.tau_b(ranks, ranks) is None


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_the_krippendorff_packages(seed: int) -> None:
    tasks = people_who_rank(seed, tasks=30, people_per_task=2 + seed)
    ours = agreement.ordinal_alpha(agreement.add_up(agreement.coincidences(task) for task in tasks))
    theirs = krippendorff.alpha(reliability_data=as_matrix(tasks), level_of_measurement="ordinal")
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_alpha_of_people_who_all_say_the_same_is_1_and_of_one_value_undefined() -> None:
    same = {"a": [1, 2, 3], "b": [1, 2, 3]}
    assert agreement.ordinal_alpha(agreement.coincidences(same)) == pytest.approx(1)
    assert agreement.ordinal_alpha(agreement.coincidences({"a": [1, 1], "b": [1, 1]})) is None


def test_one_persons_ranking_adds_no_coincidence() -> None:
    assert agreement.coincidences({"a": [1, 2, 3]}) == {}


@pytest.mark.parametrize("precision", [0.02, 0.2, 2.0])
def test_bradley_terry_is_choixs(precision: float) -> None:
    draw = random.Random(7)
    won = [(winner, loser) for winner, loser in (draw.sample(range(6), 2) for _ in range(80))]
    ours = agreement.bradley_terry(6, Counter(won), precision=precision)
    theirs = choix.opt_pairwise(6, won, alpha=precision / 2, tol=1e-12)
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_bradley_terry_of_two_items_is_the_log_odds() -> None:
    # With next to no prior, 3 wins to 1 are odds of 3.
    better, worse = agreement.bradley_terry(2, {(0, 1): 3, (1, 0): 1}, precision=1e-9)
    assert better - worse == pytest.approx(math.log(3), abs=1e-6)


def test_bradley_terry_is_finite_where_one_always_wins() -> None:
    better, worse = agreement.bradley_terry(2, {(0, 1): 1000}, precision=0.1)
    assert 0 < better < 100
    assert worse == pytest.approx(-better)


@pytest.mark.parametrize("seed", range(3))
def test_the_reliability_of_ten_people_is_found(seed: int) -> None:
    eta = agreement.reliabilities(people_who_rank(seed))
    found = [eta[f"p{person}"] for person in range(10)]
    assert stats.spearmanr(found, range(10)).statistic <= -0.9
    assert agreement.weight_of(eta["p9"]) < 0.2
    assert agreement.weight_of(eta["p0"]) > 0.8


def test_somebody_who_inverts_the_order_weighs_nothing() -> None:
    draw = random.Random(3)
    tasks = []
    for _ in range(60):
        order = draw.sample(range(1, 5), 4)
        tasks.append({"a": order, "b": order, "c": [5 - rank for rank in order]})
    eta = agreement.reliabilities(tasks)
    assert eta["c"] < 0.2
    assert agreement.weight_of(eta["c"]) == 0


def test_a_task_that_one_person_ranked_says_nothing_about_them() -> None:
    assert agreement.reliabilities([{"a": [1, 2]}]) == {}


def test_the_interval_holds_the_value_and_narrows_with_more_prompts() -> None:
    def mean_of(values: list[float]) -> Estimate:
        return agreement.bootstrap(len(values), lambda chosen: sum(values[i] for i in chosen) / len(chosen))

    draw = random.Random(0)
    few, many = (mean_of([draw.random() for _ in range(n)]) for n in (20, 2000))
    for estimate in (few, many):
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low <= estimate.value <= estimate.high
    assert few.high is not None
    assert few.low is not None
    assert many.high is not None
    assert many.low is not None
    assert many.high - many.low < few.high - few.low


def test_the_same_rankings_give_the_same_intervals() -> None:
    values = [0.1, 0.7, 0.3, 0.9]
    assert agreement.bootstrap(4, lambda chosen: sum(values[i] for i in chosen)) == agreement.bootstrap(
        4, lambda chosen: sum(values[i] for i in chosen)
    )


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_names_of_people_change_nothing(draw: random.Random) -> None:
    tasks = people_who_rank(draw.randrange(1000), tasks=5, people_per_task=3)
    names = [f"p{i}" for i in range(10)]
    other = dict(zip(names, draw.sample(names, 10), strict=True))
    renamed = [{other[who]: ranks for who, ranks in task.items()} for task in tasks]
    one, two = (
        agreement.report("b", {str(i): task for i, task in enumerate(listed)}, {}, resamples=5)
        for listed in (tasks, renamed)
    )
    assert one.pair_agreement.value == pytest.approx(two.pair_agreement.value)
    assert one.tau_b.value == pytest.approx(two.tau_b.value)
    assert one.alpha.value == pytest.approx(two.alpha.value)


def test_a_report_counts_single_rankings_and_compares_shared_ones() -> None:
    tasks = {"t1": {"a": [1, 2, 2], "b": [1, 2, 3]}, "t2": {"a": [1, 1, 1]}}
    activity = {"a": Activity(2, 1, 0, [3.0, 5.0]), "b": Activity(1, 0, 0, [4.0])}
    report = agreement.report("b1", tasks, activity, resamples=10)
    assert (report.rankings, report.overlapping_tasks, report.pairs_compared) == (3, 1, 3)
    assert report.pair_agreement.value == pytest.approx(2 / 3)
    assert report.tie_rate == pytest.approx(1 / 6)
    first, second = report.annotators
    assert (first.annotator, first.rankings, first.skipped, first.median_seconds) == ("a", 2, 1, 4.0)
    assert first.tie_rate == pytest.approx(4 / 6)
    assert second.tie_rate == 0
    assert second.pair_agreement == pytest.approx(2 / 3)


def test_a_report_about_nothing_has_no_numbers() -> None:
    report = agreement.report("b1", {}, {})
    assert report.pair_agreement.value is None
    assert report.alpha.value is None
    assert report.annotators == []
