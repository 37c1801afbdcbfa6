import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit.errors import ConfigError
from plaudit.rewards.client import RewardClient
from plaudit.rewards.combining import Combination, combine
from plaudit.rewards.settings import RewardComponent, RewardSettings

rewards = st.lists(st.floats(-100, 100), min_size=1, max_size=6)


def test_each_combination_by_hand() -> None:
    assert combine([1.0, 2.0, 6.0], combination="weighted_sum") == 9.0
    assert combine([1.0, -2.0, 6.0], combination="minimum") == -2.0
    # Mean 3, squared distances 4, 1, 9: standard deviation sqrt(14 / 3).
    value = combine([1.0, 2.0, 6.0], combination="mean_minus_std", std_multiple=0.5)
    assert value == pytest.approx(3.0 - 0.5 * math.sqrt(14 / 3))


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_of_two_judges_the_mean_less_the_standard_deviation_is_the_minimum(one: float, other: float) -> None:
    value = combine([one, other], combination="mean_minus_std")
    assert value == pytest.approx(combine([one, other], combination="minimum"), abs=1e-9)


@given(st.floats(-100, 100), st.integers(1, 5), st.floats(0, 3))
def test_judges_that_agree_lose_nothing(reward: float, judges: int, multiple: float) -> None:
    agreed = [reward] * judges
    assert combine(agreed, combination="mean_minus_std", std_multiple=multiple) == pytest.approx(reward)
    assert combine(agreed, combination="minimum") == reward


@given(rewards)
def test_without_a_multiple_it_is_the_mean_and_a_larger_one_never_earns_more(of_judges: list[float]) -> None:
    plain, less = (combine(of_judges, combination="mean_minus_std", std_multiple=multiple) for multiple in (0.0, 1.0))
    assert plain == pytest.approx(sum(of_judges) / len(of_judges), abs=1e-9)
    assert less <= plain


def characters(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def words(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


@pytest.mark.parametrize(
    ("combination", "expected"),
    [("weighted_sum", [-0.1, -0.2]), ("minimum", [-0.6, -0.7]), ("mean_minus_std", [-0.6, -0.7])],
)
def test_the_client_weights_each_judge_combines_them_and_keeps_each_by_its_name(
    combination: Combination, expected: list[float]
) -> None:
    settings = RewardSettings(
        (
            RewardComponent("characters", weight=-0.1, function="tests.trainer.rewards.test_combining:characters"),
            RewardComponent("words", weight=0.25, function="tests.trainer.rewards.test_combining:words"),
        ),
        combination=combination,
    )
    with RewardClient(settings) as client:
        client.connect()
        scores = client.submit_components(["A", "A"], ["of two", "and two"]).result()
    assert scores.components == {"characters": [6.0, 7.0], "words": [2.0, 2.0]}
    assert scores.totals == pytest.approx(expected)


def test_a_multiple_that_cannot_work_is_named() -> None:
    with pytest.raises(ConfigError, match=r"reward.std_multiple=-1.0 must be 0 or more"):
        RewardSettings(std_multiple=-1.0)
