"""Every form of preferences becomes the same thing, ties stay ties, and no text is on both sides of the split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from plaudit.data.preferences import (
    LeftOut,
    Opinion,
    Pair,
    RankedPrompt,
    is_validation,
    load_opinions,
    merged,
    opinions_of_rankings,
    split,
)
from plaudit.data.sources import is_held_out
from plaudit.data.tables import DataError
from plaudit.wire import rankings as wire


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def loaded(tmp_path: Path, *rows: Any) -> tuple[list[RankedPrompt], dict[str, int]]:
    left_out = LeftOut()
    opinions = load_opinions(written(tmp_path / "rows.jsonl", rows), left_out)
    return merged(opinions, left_out), left_out.counts


def ranking(ranks: list[int], annotator: str = "a", version: int = 1, **changes: Any) -> wire.RankingRow:
    answers = [wire.new_answer(f"answer {i}", policy=f"p{i}") for i in range(3)]
    task = wire.new_answers_row("b", "A prompt", answers, group="the-text")
    values = {
        "id": wire.content_hash(task.id, annotator, version),
        "task": task.id,
        "group": "the-text",
        "batch": "b",
        "prompt": "A prompt",
        "answers": answers,
        "ranks": ranks,
        "annotator": annotator,
        "status": "counted",
        "shown_order": [0, 1, 2],
        "at": "2026-01-01T00:00:00.000Z",
        "version": version,
    }
    return wire.RankingRow.model_validate(values | changes)


def test_n_ranked_answers_give_all_n_times_n_minus_1_halves_pairs_of_one_prompt(tmp_path: Path) -> None:
    (row,), _ = loaded(tmp_path, {"prompt": "p", "answers": ["a", "b", "c"]})
    assert row.answers == ["a", "b", "c"]
    assert [(p.first, p.second, p.target) for p in row.pairs] == [(0, 1, 1), (0, 2, 1), (1, 2, 1)]


def test_three_people_with_ties_by_hand() -> None:
    left_out = LeftOut()
    rows = [ranking([1, 2, 2], "a"), ranking([2, 1, 2], "b"), ranking([1, 1, 2], "c")]
    (row,) = merged(opinions_of_rankings(rows, left_out), left_out)
    # 0 against 1: win, loss, tie; 0 against 2: win, tie, win; 1 against 2: tie, win, win.
    assert row.pairs == [
        Pair(0, 1, wins=1, losses=1, ties=1, target=0.5),
        Pair(0, 2, wins=2, losses=0, ties=1, target=2.5 / 3),
        Pair(1, 2, wins=2, losses=0, ties=1, target=2.5 / 3),
    ]
    assert row.policies == ["p0", "p1", "p2"]
    (weighed,) = merged(opinions_of_rankings(rows, left_out), left_out, {"a": 1.0, "b": 0.0, "c": 0.5})
    assert [pair.target for pair in weighed.pairs] == [pytest.approx(1.25 / 1.5), 1.0, pytest.approx(1 / 1.5)]


def test_pairs_that_everybody_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    rows, left_out = loaded(
        tmp_path,
        {"prompt": "p", "answers": ["a", "b", "c"], "ranks": [1, 1, 2]},
        {"prompt": "q", "answers": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "r", "answers": ["same", "same", "worse"]},
    )
    assert [[(p.first, p.second) for p in row.pairs] for row in rows] == [[(0, 2), (1, 2)], [(0, 1)]]
    assert left_out == {
        "pairs that everybody ties": 2,
        "prompts without a pair that anybody tells apart": 1,
        "answers with the same text as another to their prompt": 1,
    }


def test_only_the_newest_word_of_each_person_counts_and_the_rest_is_told() -> None:
    left_out = LeftOut()
    rows = [
        ranking([1, 2, 3], version=1),
        ranking([3, 2, 1], version=2),
        ranking([], "b", status="skipped"),
        ranking([1, 2, 3], "c", purpose="evaluation"),
        ranking([1, 2, 3], "d", split="held_out"),
    ]
    (opinion,) = opinions_of_rankings(rows, left_out)
    assert opinion.ranks == [3, 2, 1]
    assert left_out.counts == {"tasks skipped": 1, "rankings of evaluations or of held-out texts": 2}


def test_the_ranking_services_export_is_read_as_it_is(tmp_path: Path) -> None:
    rows, _ = loaded(tmp_path, ranking([1, 2, 2]).model_dump(mode="json"))
    assert [(row.group, [p.target for p in row.pairs]) for row in rows] == [("the-text", [1.0, 1.0])]
    with pytest.raises(DataError, match=r"row 1: no ranking \(.*ranks \[1, 3, 3\] leave a place out"):
        loaded(tmp_path, ranking([1, 2, 2]).model_dump(mode="json") | {"ranks": [1, 3, 3]})


USER = {"role": "user", "content": "Hello"}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hello", "chosen": "good", "rejected": "bad"}, "Hello"),
        ({"prompt": [USER], "chosen": [said("good")], "rejected": [said("bad")]}, [USER]),
        ({"chosen": [USER, said("good")], "rejected": [USER, said("bad")]}, [USER]),
        ({"prompt": "Hello", "chosen": [USER, said("good")], "rejected": [USER, said("bad")]}, [USER]),
        ({"prompt": "Hello", "chosen": [said("good")], "rejected": [said("bad")]}, [USER]),
    ],
)
def test_chosen_and_rejected_are_two_answers_with_or_without_a_prompt(tmp_path: Path, row: Any, prompt: Any) -> None:
    (found,), _ = loaded(tmp_path, row)
    assert (found.prompt, found.answers) == (prompt, ["good", "bad"])
    assert found.pairs == [Pair(0, 1, wins=1, losses=0, ties=0, target=1.0)]


def test_the_implicit_prompt_of_two_texts_ends_with_the_speaker_or_a_word(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows, _ = loaded(
        tmp_path,
        {"chosen": f"{start} I'm glad.", "rejected": f"{start} I'm sad."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
    )
    assert [row.prompt for row in rows] == [start, "The sky is"]
    assert [row.answers for row in rows] == [[" I'm glad.", " I'm sad."], [" blue.", " black."]]


def test_several_pairs_of_one_prompt_are_one_row_and_margins_are_kept(tmp_path: Path) -> None:
    (row,), _ = loaded(
        tmp_path,
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5},
        {"prompt": "p", "chosen": "c", "rejected": "a", "margin": 2},
    )
    assert row.answers == ["a", "b", "c"]
    assert row.pairs == [Pair(0, 1, 1, 0, 0, 1.0, margin=0.5), Pair(0, 2, 0, 1, 0, 0.0, margin=-2.0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has the columns text; preferences are"),
        ({"prompt": "p", "answers": ["a"]}, "row 1: expected a string `prompt` and a list `answers` of at least two"),
        ({"prompt": "p", "answers": ["a", 5]}, "row 1: expected a string `prompt`"),
        ({"prompt": "p", "answers": ["a", "b"], "ranks": [1]}, r"ranks=\[1\] for 2 answers"),
        ({"chosen": "a", "rejected": [USER, said("b")]}, "give all as texts, or all as conversations"),
        ({"chosen": [USER, said("a")], "rejected": [said("b")]}, "must differ in the assistant's last turn alone"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "much"}, "margin='much' is no number"),
        ({"prompt": "p", "answers": ["a", "\ud800"]}, "holds half a character"),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loaded(tmp_path, row)


def rows_of(groups: int, per_group: int = 3) -> list[RankedPrompt]:
    opinions = [
        Opinion(f"prompt {g}-{i}", f"text {g}", ["a", "b"], [1, 2]) for g in range(groups) for i in range(per_group)
    ]
    return merged(opinions, LeftOut())


@pytest.mark.parametrize("groups", [2, 3, 10, 400])
def test_no_text_is_on_both_sides_and_there_is_always_one_held_out(groups: int) -> None:
    left_out = LeftOut()
    rows = rows_of(groups)
    training, held_out = split(rows, 0.1, left_out)
    assert {row.group for row in training}.isdisjoint(row.group for row in held_out)
    assert len(training) + len(held_out) == len(rows)
    assert training
    assert held_out
    assert not left_out.counts
    if groups == 400:
        assert 20 <= len({row.group for row in held_out}) <= 60  # a tenth of 400, as a hash draws it
    # What is added later moves nothing to the other side.
    again = split(rows_of(groups + 100), 0.1, left_out)[1]
    if groups == 400:
        assert {row.group for row in held_out} <= {row.group for row in again}


def test_a_prompt_that_two_texts_begin_with_is_not_trained_on_when_it_is_held_out() -> None:
    inside = next(f"text {i}" for i in range(100) if is_validation(f"text {i}", 0.1))
    outside = [f"text {i}" for i in range(20) if not is_validation(f"text {i}", 0.1)]
    opinions = [Opinion("The film", group, ["a", "b"], [1, 2]) for group in (inside, outside[0])]
    opinions += [Opinion("Another", outside[1], ["a", "b"], [1, 2])]
    left_out = LeftOut()
    training, held_out = split(merged(opinions, left_out), 0.1, left_out)
    assert [(row.prompt, row.group) for row in held_out] == [("The film", inside)]
    assert [(row.prompt, row.group) for row in training] == [("Another", outside[1])]
    assert left_out.counts == {"training prompts that are held out with another text": 1}


def test_pairs_of_whole_texts_are_split_pair_by_pair_and_a_beginning_by_chance_is_no_prompt(tmp_path: Path) -> None:
    pairs = [{"chosen": f"A good text {i}", "rejected": f"Bad text {i}"} for i in range(60)]
    pairs += [{"chosen": f"I loved it {i}", "rejected": f"I left after {i}"} for i in range(10)]
    rows, _ = loaded(tmp_path, *pairs)
    assert {row.prompt for row in rows} == {""}
    assert {len(row.pairs) for row in rows} == {1}
    assert [row.answers for row in rows[-1:]] == [["I loved it 9", "I left after 9"]]
    left_out = LeftOut()
    training, held_out = split(rows, 0.1, left_out)
    assert len(training) + len(held_out) == 70
    assert held_out
    assert not left_out.counts


def test_a_held_out_text_without_a_prompt_is_not_trained_on_in_another_pair() -> None:
    inside = next(f"text {i}" for i in range(100) if is_validation(f"text {i}", 0.1))
    outside = [f"text {i}" for i in range(20) if not is_validation(f"text {i}", 0.1)]
    texts = [(inside, ["x", "y"]), (outside[0], ["y", "z"]), (outside[1], ["v", "w"])]
    left_out = LeftOut()
    training, _ = split(merged([Opinion("", group, both, [1, 2]) for group, both in texts], left_out), 0.1, left_out)
    assert [row.answers for row in training] == [["v", "w"]]
    assert left_out.counts == {"training prompts that are held out with another text": 1}


def test_texts_that_the_stages_train_on_are_split_anew() -> None:
    texts = [f"a text {i}" for i in range(2000)]
    trained_on = [text for text in texts if not is_held_out(text, 0.1)]
    held_out = [text for text in trained_on if is_validation(wire.group_of(text), 0.1)]
    assert 0.07 < len(held_out) / len(trained_on) < 0.13
