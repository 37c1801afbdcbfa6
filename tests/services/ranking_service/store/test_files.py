"""Rankings out and in again without loss, and other projects' formats."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.ranking_service import Fill, Invite, rows, upload
from plaudit.ranking_service import exchange
from plaudit.ranking_service.exchange import Dropped
from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import batches, files, leases, people, submissions
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.submissions import Judgement
from plaudit.wire import rankings as wire
from plaudit.wire.rankings import RankingRow, Turn

TALK = [Turn(role="user", content="Hi"), Turn(role="assistant", content="Hello."), Turn(role="user", content="Well?")]


def exported(database: Database, **how: bool) -> list[RankingRow]:
    with database.read() as connection:
        return list(files.export(connection, None, late=how.get("late", False), history=how.get("history", False)))


def import_rows(database: Database, listed: list[RankingRow], only: str | None = None) -> int:
    with database.write() as connection:
        return files.import_rows(database, connection, listed, now_ms(), only=only)


@pytest.fixture
def busy(database: Database, someone: Invite) -> Database:
    """A database after a day's work: ties, skips, flags, edits, undos, notes, duplicates, a conversation, late ones."""
    draw = random.Random(5)
    listed = rows(8)
    same = [wire.new_answer(text, policy=policy) for policy, text in (("a", "x"), ("b", "y"), ("c", "x"), ("d", "z"))]
    listed.append(wire.new_answers_row("b1", TALK, same, split="held_out", group="g" * 32))
    with database.write() as connection:
        batches.upload(database, connection, upload(listed, round=2, overlap=3, overlap_share=1), now_ms())
    for person in [someone() for _ in range(4)]:
        while True:
            with database.write() as connection:
                identity = leases.next_assignment(connection, person, now_ms())
            if identity is None:
                break
            with database.read() as connection:
                shown = submissions.show(connection, person, identity)
            word = Judgement(
                "ranking",
                {answer.id: draw.randint(1, len(shown.answers)) for answer in shown.answers},
                note=draw.choice(["", "fine", "a note\nof \x00 two lines"]),
                seconds=draw.uniform(1, 99),
            )
            kind = draw.random()
            said = [word]
            if kind < 0.15:
                said = [Judgement("skip")]
            elif kind < 0.3:
                said = [Judgement("flag", flags=("other", "broken"), note="why")]
            elif kind < 0.5:
                said = [word, Judgement("withdraw"), word]
            for version, one in enumerate(said):
                with database.write() as connection:
                    submissions.submit(database, connection, person, identity, f"k{version}", version, one, now_ms())
    with database.write() as connection:
        batches.close(connection, "b1", now_ms())
        (first, version, _, _) = submissions.newest_of(connection, person)[0]
        again = Judgement("ranking", {a.id: 1 for a in submissions.show(connection, person, first).answers})
        submissions.submit(database, connection, person, first, "late", version, again, now_ms())
    return database


@pytest.mark.parametrize("how", [{}, {"late": True}, {"history": True, "late": True}])
def test_export_import_export_is_byte_identical(busy: Database, tmp_path: Path, how: dict[str, bool]) -> None:
    before = list(exchange.lines(exported(busy, **how)))
    assert {"counted", "skipped", "flagged"} <= {json.loads(line)["status"] for line in before}
    other = Database(str(tmp_path / "other.db"))
    other.migrate()
    assert import_rows(other, [RankingRow.model_validate_json(line) for line in before]) == len(before)
    assert list(exchange.lines(exported(other, **how))) == before
    # And again: nothing is new.
    assert import_rows(other, [RankingRow.model_validate_json(line) for line in before]) == 0
    assert list(exchange.lines(exported(other, **how))) == before
    other.close()


def test_an_answer_that_was_merged_has_the_rank_of_the_one_that_was_shown(busy: Database) -> None:
    found = [row for row in exported(busy) if row.prompt == TALK and row.ranks]
    assert found
    for row in found:
        assert row.ranks[0] == row.ranks[2]
        assert sorted(row.shown_order) == [0, 1, 3]
        assert (row.split, row.group, row.round) == ("held_out", "g" * 32, 2)


def test_pages_hold_what_the_export_holds_and_end(busy: Database) -> None:
    found: list[RankingRow] = []
    after, until = 0, files.last_seq(busy)
    while True:
        with busy.read() as connection:
            page = files.page(connection, "b1", after=after, until=until, limit=3, late=False)
        found += page.rows
        after = page.after
        if not page.more:
            break
    assert found == exported(busy)
    with busy.read() as connection:
        again = files.page(connection, "b1", after=after, until=until, limit=3, late=False)
    assert (again.rows, again.after, again.more) == ([], after, False)


def good_row() -> dict[str, Any]:
    (row,) = exchange.rows_of([{"prompt": "p", "answers": ["a", "b", "c"]}], "ranked", "b1")
    return row.model_dump()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda row: row | {"ranks": [0, 1, 2]}, "greater than or equal to 1"),
        (lambda row: row | {"ranks": [1, 2]}, "2 ranks for 3 answers"),
        (lambda row: row | {"ranks": [1, 3, 3]}, "leave a place out"),
        (lambda row: row | {"ranks": []}, "needs 3 ranks"),
        (lambda row: row | {"status": "skipped"}, "needs empty ranks"),
        (lambda row: row | {"shown_order": [0, 1, 7]}, "goes beyond the 3 answers"),
        (lambda row: row | {"shown_order": [0, 0, 1]}, "names an answer twice"),
        (lambda row: row | {"answers": [row["answers"][0]] * 2, "ranks": [1, 2]}, "have the same id"),
        (lambda row: row | {"version": 0}, "greater than or equal to 1"),
        (lambda row: row | {"at": "yesterday"}, "match pattern"),
        (lambda row: row | {"who": "me"}, "Extra inputs"),
    ],
)
def test_a_row_that_is_no_ranking_is_refused(spoil: Callable[[dict[str, Any]], dict[str, Any]], said: str) -> None:
    RankingRow.model_validate(good_row())
    with pytest.raises(ValueError, match=said):
        RankingRow.model_validate(spoil(good_row()))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda row: {"batch": "b2"}, "row 2: it belongs to batch 'b2', and this is an import to 'b1'"),
        (lambda row: {"answers": [*row.answers[:2], wire.new_answer("other")]}, "row 2: task .* another prompt"),
        (lambda row: {"shown_order": [0, 1]}, "row 2: shown_order .* is no order of the distinct answers"),
        (lambda row: {"id": "other", "shown_order": [2, 1, 0]}, "row 2: 'imported' saw this task in the order"),
        (lambda row: {"id": "other"}, "row 2: 'imported' already has version 1 of this task"),
        (lambda row: {"round": 7}, "row 2: batch 'b1' has round=0, not 7"),
    ],
)
def test_an_import_with_a_wrong_row_is_refused_whole(
    database: Database, spoil: Callable[[RankingRow], dict[str, Any]], said: str
) -> None:
    row = RankingRow.model_validate(good_row())
    with pytest.raises(ProblemError, match=said):
        import_rows(database, [row, row.model_copy(update=spoil(row))], only="b1")
    assert exported(database) == []


def test_a_merged_answer_with_a_rank_of_its_own_is_refused(database: Database) -> None:
    row = RankingRow.model_validate(good_row())
    answers = [row.answers[0], row.answers[1], wire.new_answer("a", policy="other")]
    wrong = row.model_copy(update={"answers": answers, "shown_order": [0, 1]})
    with pytest.raises(ProblemError, match="row 1: answers 0 and 2 are the same text and have ranks 1 and 3"):
        import_rows(database, [wrong])


def test_an_import_goes_on_where_people_have_ranked(database: Database, fill: Fill, someone: Invite) -> None:
    fill(2, overlap=2, overlap_share=1)
    task = rows(2)[0]
    row = RankingRow(
        id="elsewhere",
        task=task.id,
        group=task.group,
        batch="b1",
        prompt=task.prompt,
        answers=task.answers,
        ranks=[1, 2, 2, 3],
        annotator="p-elsewhere",
        status="counted",
        shown_order=[3, 2, 1, 0],
        at="2026-01-02T03:04:05.678Z",
        version=1,
    )
    assert import_rows(database, [row]) == 1
    (back,) = exported(database)
    assert back == row
    with database.read() as connection:
        assert batches.progress(connection, "b1").counted == 1


def test_pairs_for_trl_leave_ties_out_and_count_them() -> None:
    dropped = Dropped()
    row = RankingRow.model_validate(good_row() | {"ranks": [1, 2, 2]})
    pairs = list(exchange.pairs_of([row], "trl", dropped))
    assert pairs == [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c"},
    ]
    assert dropped == Dropped(ties=1, rows=0)


def test_skips_are_counted_when_they_are_left_out() -> None:
    dropped = Dropped()
    row = RankingRow.model_validate(good_row() | {"ranks": [], "status": "skipped"})
    assert list(exchange.pairs_of([row], "hh", dropped)) == []
    assert dropped == Dropped(ties=0, rows=1)


def talk_row() -> RankingRow:
    answers = [wire.new_answer("Good.", policy="p0"), wire.new_answer("Bad.", policy="p1")]
    task = wire.new_answers_row("b1", TALK, answers)
    return RankingRow(
        **task.model_dump(exclude={"id", "answers"}),
        id="r",
        task=task.id,
        answers=answers,
        ranks=[2, 1],
        annotator="p-1",
        status="counted",
        shown_order=[0, 1],
        at="2026-01-02T03:04:05.678Z",
        version=1,
    )


def test_a_conversation_for_hh_is_a_transcript() -> None:
    (pair,) = exchange.pairs_of([talk_row()], "hh", Dropped())
    head = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Well?\n\nAssistant: "
    assert pair == {"chosen": head + "Bad.", "rejected": head + "Good."}


def test_a_comparison_for_summarize_names_policies_and_the_choice() -> None:
    (pair,) = exchange.pairs_of([talk_row()], "summarize", Dropped())
    assert pair["choice"] == 1
    assert [summary["policy"] for summary in pair["summaries"]] == ["p0", "p1"]
    assert (pair["worker"], pair["batch"]) == ("p-1", "b1")


@pytest.mark.parametrize("form", ["trl", "hh"])
def test_pairs_that_were_written_can_be_read_again(form: exchange.PairFormat) -> None:
    pairs = list(exchange.pairs_of([talk_row()], form, Dropped()))
    (row,) = exchange.rows_of(pairs, form, "again")
    assert row.prompt == TALK
    assert [answer.text for answer in row.answers] == ["Bad.", "Good."]
    assert row.ranks == [1, 2]
    assert list(exchange.pairs_of([row], form, Dropped())) == pairs


def test_comparisons_of_summarize_can_be_read() -> None:
    item = {
        "info": {"id": "t3", "post": "A long post.", "title": "T", "subreddit": "r"},
        "summaries": [{"text": "one", "policy": "sup2", "note": "x"}, {"text": "two", "policy": "ref", "note": "y"}],
        "choice": 1,
        "worker": "w9",
        "batch": "batch3",
        "split": "valid1",
        "extra": {},
    }
    first, second = exchange.rows_of([item, item], "summarize", "b1")
    assert (first.ranks, first.annotator, first.split) == ([2, 1], "w9", "held_out")
    # The same comparison twice is two people's.
    assert second.annotator == "w9-2"


@pytest.mark.parametrize(
    ("form", "item", "said"),
    [
        ("trl", {"chosen": "a", "rejected": "b"}, "row 1: it has no 'prompt'"),
        ("trl", {"prompt": "p", "chosen": "a", "rejected": "a"}, "both answers are the same text"),
        ("trl", {"chosen": [{"role": "user", "content": "x"}], "rejected": []}, "row 1: chosen has 1 messages"),
        ("hh", {"chosen": "no turns", "rejected": "none"}, "does not begin with"),
        ("hh", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "one turn alone"),
        ("summarize", {"info": {}, "summaries": [], "choice": 0}, "neither a post nor an article"),
        ("ranked", {"prompt": "p", "answers": ["only"]}, 'expected {"prompt", "answers"}'),
        ("ranked", {"prompt": "p", "answers": ["a", "a"]}, "two answers are the same text"),
    ],
)
def test_an_object_of_another_shape_is_refused_with_its_number(form: Any, item: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        exchange.rows_of([item], form, "b1")


def test_deleting_a_person_keeps_the_rankings_under_a_fresh_name(busy: Database) -> None:
    before = exported(busy, history=True, late=True)
    gone = before[0].annotator
    with busy.write() as connection:
        people.delete_person(connection, gone, now_ms())
    after = exported(busy, history=True, late=True)
    assert len(after) == len(before)
    assert gone not in {row.annotator for row in after}
    fresh = {new.annotator for old, new in zip(before, after, strict=True) if old.annotator == gone}
    assert len(fresh) == 1
    for old, new in zip(before, after, strict=True):
        assert new.ranks == old.ranks
        if old.annotator == gone:
            assert new.note == ""  # free text may say who somebody is
