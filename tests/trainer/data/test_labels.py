"""What a value of a label column means, and what is said about it."""

from collections.abc import Sequence

import pytest

from plaudit.data.labels import read_labels, spelled
from plaudit.data.sources import Label, LabelledTexts
from plaudit.errors import ConfigError
from plaudit.settings.reward_model import RewardModelConfig

NAMES = ("NEGATIVE", "POSITIVE")


def label_indices(data: LabelledTexts, names: Sequence[str]) -> list[int]:
    reading = read_labels(data.labels, names, data.class_names)
    return [reading.index[spelled(label)] for label in data.labels]


def test_labels_may_be_numbers_or_names_and_anything_else_is_named() -> None:
    names = ("NEGATIVE", "POSITIVE")
    assert label_indices(LabelledTexts(["a", "b"], [1, 0]), names) == [1, 0]
    assert label_indices(LabelledTexts(["a", "b"], ["POSITIVE", "NEGATIVE"]), names) == [1, 0]
    with pytest.raises(ConfigError, match="labels 2, neutral are neither"):
        label_indices(LabelledTexts(["a", "b", "c"], [0, 2, "neutral"]), names)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["0", "1"], ("1", "0"), [1, 0]),
        ([0, 1], ("1", "0"), [1, 0]),
        (["1", "2", "4", "3"], ("1", "2", "3", "4", "5"), [0, 1, 3, 2]),
        ([1, 2, 3, 4], ("1", "2", "3", "4"), [0, 1, 2, 3]),
        (["0", "1", "2"], ("bad", "fair", "good"), [0, 1, 2]),
        ([1.0, 0.0], ("NEGATIVE", "POSITIVE"), [1, 0]),
        (["1.0", "0.0"], ("NEGATIVE", "POSITIVE"), [1, 0]),
        (["True", "False"], ("NEGATIVE", "POSITIVE"), [1, 0]),
        ([True, False], ("NEGATIVE", "POSITIVE"), [1, 0]),
        (["None", "toxic"], ("None", "toxic"), [0, 1]),
    ],
)
def test_names_win_where_labels_are_names_and_numbers_count_them_otherwise(
    labels: list[Label], names: tuple[str, ...], expected: list[int]
) -> None:
    assert label_indices(LabelledTexts([""] * len(labels), labels), names) == expected


def test_labels_that_can_be_read_in_two_ways_are_refused_with_both() -> None:
    with pytest.raises(ConfigError) as error:
        read_labels([0, 1, 2], ("1", "2", "3"))
    assert "(0 is '1', 1 is '2', 2 is '3')" in str(error.value)
    assert "(1 is '1', 2 is '2', the others unknown)" in str(error.value)


def test_numbers_that_the_data_set_itself_names_are_matched_by_word() -> None:
    data = LabelledTexts(["a", "b"], [0, 1], class_names=("neg", "pos"))
    assert label_indices(data, ("POS", "NEG")) == [1, 0]
    assert label_indices(data, ("NEGATIVE", "POSITIVE")) == [0, 1]
    with pytest.raises(ConfigError, match=r"the data call labels neg, pos, .* lacks neg: give --label-names neg pos"):
        label_indices(data, ("pos", "other"))


def test_one_label_teaches_nothing() -> None:
    with pytest.raises(ConfigError, match="every text has the label 1"):
        read_labels([1, 1, "1"], ("NEGATIVE", "POSITIVE"))


def test_the_reading_of_labels_is_told_with_its_counts() -> None:
    labels: list[Label] = ["1", "0", "1"]
    assert read_labels(labels, ("NEGATIVE", "POSITIVE", "NEUTRAL")).lines(labels) == [
        "label 0 is NEGATIVE: 1 rows",
        "label 1 is POSITIVE: 2 rows",
        "label NEUTRAL: no row, so nothing can be learnt about it",
    ]
    assert read_labels([0, 1], ("a", "b"), ("neg", "pos")).lines([0, 1])[0] == "label 0 (neg) is a: 1 rows"


@pytest.mark.parametrize(
    ("values", "negative", "positive"),
    [
        (["1", "2", "3", "4", "5"], "1 2", "4 5"),
        ([1, 2, 3, 4, 5], "1 2", "4 5"),
        ([0.5, 2.5, 3.0, 3.5, 5.0], "0.5 2.5", "3.5 5"),
        (["0", "1", "2", "3", "4"], "0 1", "3 4"),
        ([1, 4, 5, 6, 7, 10], "1 4", "10 7"),
        ([-1, 0, 1], "-1", "1"),
        ([-1, 1], "-1", "1"),
        ([1, 2], "1", "2"),
        ([0, 4], "0", "4"),
        (["Good", "bad", "NEUTRAL"], "bad", "Good"),
        (["negative", "positive"], "negative", "positive"),
        (["pos", "neg"], "neg", "pos"),
    ],
)
def test_stars_and_words_are_understood(values: list[Label], negative: str, positive: str) -> None:
    index = read_labels(values, NAMES).index
    assert sorted(value for value, i in index.items() if i == 0) == negative.split()
    assert sorted(value for value, i in index.items() if i == 1) == positive.split()


def test_stars_are_told_with_their_counts_and_what_is_left_out() -> None:
    stars: list[Label] = ["5", "1", "3", "4", "5"]
    assert read_labels(stars, NAMES).lines(stars) == [
        "labels are up to five stars; --label-map says otherwise if that is wrong",
        "label 1 is NEGATIVE: 1 rows",
        "label 4 is POSITIVE: 1 rows",
        "label 5 is POSITIVE: 2 rows",
        "label 3 is left out: 1 rows",
    ]


@pytest.mark.parametrize("values", [[0, 1, 2], [1, 2, 3], [0, 50, 100], ["a", "b"]])
def test_values_of_unknown_meaning_are_asked_about(values: list[Label]) -> None:
    with pytest.raises(ConfigError, match="--label-map"):
        read_labels(values, NAMES)


def test_other_names_than_the_default_ones_are_not_guessed_at() -> None:
    with pytest.raises(ConfigError, match="--label-map"):
        read_labels([1, 2, 3, 4, 5], ("POSITIVE", "NEGATIVE"))


def test_stars_that_are_all_good_teach_nothing() -> None:
    with pytest.raises(ConfigError, match="only 4, 5 would be learnt, all as one label"):
        read_labels([3, 4, 5], NAMES)


def test_a_label_map_says_what_values_mean_and_leaves_the_others_out() -> None:
    values: list[Label] = ["0", "50", "100", "100"]
    reading = read_labels(values, NAMES, label_map=["0=NEGATIVE", "100=POSITIVE"])
    assert reading.index == {"0": 0, "100": 1}
    assert "label 50 is left out: 1 rows" in reading.lines(values)


@pytest.mark.parametrize(
    ("label_map", "says"),
    [
        (["0=GOOD", "1=POSITIVE"], "'GOOD' is not among label_names=NEGATIVE, POSITIVE"),
        (["7=NEGATIVE", "1=POSITIVE"], "no row has the label '7'; there are 0, 1"),
        (["0=POSITIVE", "1=POSITIVE"], "only 0, 1 would be learnt, all as one label"),
    ],
)
def test_a_label_map_that_does_not_fit_is_refused(label_map: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_labels([0, 1], NAMES, label_map=label_map)


def test_an_entry_of_a_label_map_is_a_value_and_a_name() -> None:
    with pytest.raises(ConfigError, match="'5' must be VALUE=NAME"):
        RewardModelConfig(label_map=("5",))
