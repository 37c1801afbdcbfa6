"""Simulated people: the noise is the model's, and nothing but seed, person and texts decides what they say."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest

from plaudit.run.annotator import Habits, as_text, decide, ranking
from plaudit.wire.rankings import Turn

TEXTS = {"a": "bad", "b": "better", "c": "best of all"}


def by_length(prompt: str, answers: Sequence[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def test_without_noise_the_order_is_the_judges() -> None:
    assert ranking([0.1, 3.0, -2.0], Habits(), random.Random(0)) == [2, 1, 3]


def test_equal_scores_tie_and_scores_within_the_margin_of_the_best_of_their_place_do() -> None:
    assert ranking([1.0, 1.0, 0.0], Habits(), random.Random(0)) == [1, 1, 2]
    # 1.0 and 0.6 share a place, 0.3 is too far from 1.0 though near 0.6, and shares the next one with 0.0.
    assert ranking([1.0, 0.6, 0.3, 0.0], Habits(tie_margin=0.5), random.Random(0)) == [1, 1, 2, 2]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_best_of_three_wins_as_often_as_plackett_luce_says(temperature: float) -> None:
    scores, draw, n = [0.5, 0.2, 0.0], random.Random(1), 20_000
    firsts = Counter(ranking(scores, Habits(temperature=temperature), draw).index(1) for _ in range(n))
    weights = [math.exp(score / temperature) for score in scores]
    for i, weight in enumerate(weights):
        assert firsts[i] / n == pytest.approx(weight / sum(weights), abs=0.015)


def test_the_second_place_is_drawn_among_the_others_in_the_same_way() -> None:
    scores, draw, n = [2.0, 0.5, 0.0], random.Random(2), 20_000
    ranked = [ranks for _ in range(n) if (ranks := ranking(scores, Habits(temperature=1), draw))[0] == 1]
    second = sum(ranks[1] == 2 for ranks in ranked) / len(ranked)
    assert second == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.015)


def test_a_careless_person_puts_anything_first_equally_often() -> None:
    draw, n = random.Random(3), 9000
    firsts = Counter(ranking([9.0, 0.0, -9.0], Habits(carelessness=1), draw).index(1) for _ in range(n))
    for i in range(3):
        assert firsts[i] / n == pytest.approx(1 / 3, abs=0.02)


def test_the_order_in_which_answers_are_shown_changes_nothing() -> None:
    habits = Habits(temperature=5)
    for person in map(str, range(50)):
        shown_otherwise = dict(reversed(TEXTS.items()))
        assert decide("p", TEXTS, by_length, habits, person=person) == decide(
            "p", shown_otherwise, by_length, habits, person=person
        )


def test_two_people_have_noise_of_their_own_and_each_repeats_what_they_said() -> None:
    habits = Habits(temperature=5)
    said = [decide("p", TEXTS, by_length, habits, person=str(i)) for i in range(30)]
    assert len({tuple(sorted(ranks.items())) for ranks in said if ranks is not None}) > 1
    assert said == [decide("p", TEXTS, by_length, habits, person=str(i)) for i in range(30)]


def test_the_share_of_skips_is_the_one_asked_for() -> None:
    habits = Habits(skips=0.3)
    skipped = sum(decide(f"p{i}", TEXTS, by_length, habits, person="x") is None for i in range(3000))
    assert skipped / 3000 == pytest.approx(0.3, abs=0.03)


def test_the_judge_gets_a_conversation_as_a_line_for_each_turn() -> None:
    turns = [Turn(role="user", content="Hello"), Turn(role="assistant", content="Yes?")]
    assert as_text(turns) == "user: Hello\nassistant: Yes?\n"
    assert as_text("This film") == "This film"
