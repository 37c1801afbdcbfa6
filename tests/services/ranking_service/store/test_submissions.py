"""What people say, twice, at once, and in two tabs, on both databases."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from sqlalchemy import func, select, update

from harness.ranking_service import Fill, Invite
from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import batches, files, submissions
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.leases import LEASE_MS, next_assignment
from plaudit.ranking_service.store.schema import assignments
from plaudit.ranking_service.store.schema import submissions as submissions_table
from plaudit.ranking_service.store.submissions import ConflictError, Judgement, ShownTask
from plaudit.wire import rankings as wire


@dataclass
class Desk:
    """One person with one task before them."""

    database: Database
    person: int
    assignment: str

    @property
    def shown(self) -> ShownTask:
        with self.database.read() as connection:
            return submissions.show(connection, self.person, self.assignment)

    def order(self, *places: int) -> Judgement:
        return Judgement("ranking", {a.id: place for a, place in zip(self.shown.answers, places, strict=True)})

    def say(self, word: Judgement, *, key: str | None = None, version: int | None = None) -> wire.Accepted:
        shown = self.shown
        with self.database.write() as connection:
            return submissions.submit(
                self.database,
                connection,
                self.person,
                self.assignment,
                shown.key if key is None else key,
                shown.version if version is None else version,
                word,
                now_ms(),
            )

    def exported(self, *, late: bool = False, history: bool = False) -> list[wire.RankingRow]:
        with self.database.read() as connection:
            return list(files.export(connection, ["b1"], late=late, history=history))

    def recorded(self) -> int:
        with self.database.read() as connection:
            return int(connection.execute(select(func.count()).select_from(submissions_table)).scalar_one())


@pytest.fixture
def desk(database: Database, fill: Fill, someone: Invite) -> Desk:
    fill(1, overlap_share=0)
    person = someone()
    with database.write() as connection:
        assignment = next_assignment(connection, person, now_ms())
    assert assignment is not None
    return Desk(database, person, assignment)


def test_a_ranking_is_exported_with_its_ties_in_the_order_of_the_file(desk: Desk) -> None:
    shown = [answer.id for answer in desk.shown.answers]
    assert desk.say(desk.order(1, 2, 2, 3)).status == "counted"
    (row,) = desk.exported()
    given = dict(zip(shown, (1, 2, 2, 3), strict=True))
    assert row.ranks == [given[answer.id] for answer in row.answers]
    assert [row.answers[i].id for i in row.shown_order] == shown
    assert (row.status, row.version) == ("counted", 1)


def test_gaps_are_closed(desk: Desk) -> None:
    desk.say(desk.order(1, 4, 4, 4))
    (row,) = desk.exported()
    assert sorted(row.ranks) == [1, 2, 2, 2]


@pytest.mark.parametrize("same_key", [True, False])
def test_sending_twice_makes_one_version(desk: Desk, same_key: bool) -> None:
    word = desk.order(1, 2, 3, 4)
    first = desk.say(word, key="one", version=0)
    again = desk.say(word, key="one" if same_key else "another tab", version=0)
    assert not first.replayed
    assert again == first.model_copy(update={"replayed": True})
    assert desk.recorded() == 1


def test_a_double_click_at_the_same_moment_makes_one_version(desk: Desk) -> None:
    word = desk.order(1, 2, 3, 4)
    begin = threading.Barrier(8)

    def click(number: int) -> wire.Accepted:
        begin.wait(timeout=60)
        with desk.database.write() as connection:
            return submissions.submit(desk.database, connection, desk.person, desk.assignment, "one", 0, word, now_ms())

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(click, range(8)))
    assert [answer.replayed for answer in answers].count(False) == 1
    assert desk.recorded() == 1


def test_two_edits_of_one_version_are_a_conflict_that_shows_both(desk: Desk) -> None:
    desk.say(desk.order(1, 2, 3, 4), key="one", version=0)
    other = desk.order(4, 3, 2, 1)
    with pytest.raises(ConflictError, match="version 0 of this ranking, and 1 is the newest") as caught:
        desk.say(other, key="two", version=0)
    current = caught.value.shown.current
    assert current is not None
    assert current == Judgement("ranking", desk.order(1, 2, 3, 4).ranks, seconds=current.seconds)
    assert current.seconds == pytest.approx(0, abs=60)
    assert caught.value.theirs == other
    assert desk.recorded() == 1


def test_a_key_that_was_used_for_something_else_is_a_conflict(desk: Desk) -> None:
    desk.say(desk.order(1, 2, 3, 4), key="one")
    with pytest.raises(ConflictError, match="was used for another judgement"):
        desk.say(desk.order(2, 1, 3, 4), key="one")


def test_an_edit_adds_a_version_and_the_newest_is_exported(desk: Desk) -> None:
    desk.say(desk.order(1, 2, 3, 4))
    assert desk.say(desk.order(2, 1, 3, 4)).version == 2
    (row,) = desk.exported()
    assert row.version == 2
    assert [row.version for row in desk.exported(history=True)] == [1, 2]


def test_undo_adds_a_version_and_shows_what_was_there(desk: Desk) -> None:
    word = desk.order(1, 2, 2, 3)
    desk.say(word)
    assert desk.say(Judgement("withdraw"), key="undo").status == "withdrawn"
    assert desk.shown.draft is not None
    assert desk.shown.draft.ranks == word.ranks
    (row,) = desk.exported()
    assert (row.status, row.ranks, row.version) == ("withdrawn", [], 2)
    with desk.database.write() as connection:
        assert next_assignment(connection, desk.person, now_ms()) == desk.assignment
    assert desk.say(desk.order(1, 1, 1, 1)).status == "counted"


def test_there_is_nothing_to_undo_before_anything_was_said_or_twice(desk: Desk) -> None:
    with pytest.raises(ProblemError, match="nothing to undo"):
        desk.say(Judgement("withdraw"), key="undo")
    desk.say(Judgement("skip"))
    desk.say(Judgement("withdraw"), key="undo")
    with pytest.raises(ProblemError, match="nothing to undo"):
        desk.say(Judgement("withdraw"), key="again")


def test_a_flag_keeps_its_reasons_and_the_note(desk: Desk) -> None:
    desk.say(Judgement("flag", flags=("private", "harmful"), note="A phone number."))
    (row,) = desk.exported()
    assert (row.status, row.flags, row.note) == ("flagged", ["harmful", "private"], "A phone number.")


@pytest.mark.parametrize(
    ("spoil", "name", "said"),
    [
        (lambda ranks: ranks | {"nobody": 1}, "unknown-answer", "this task has no answer 'nobody'"),
        (lambda ranks: ranks | {next(iter(ranks)): 0}, "rank-out-of-range", "has rank 0; ranks go from 1"),
        (lambda ranks: ranks | {next(iter(ranks)): 5}, "rank-out-of-range", "has rank 5; ranks go from 1"),
        (lambda ranks: dict(list(ranks.items())[:2]), "incomplete-ranking", "2 of 4 answers have no rank"),
    ],
)
def test_a_ranking_that_is_none_is_refused_and_says_where(
    desk: Desk, spoil: Callable[[dict[str, int]], dict[str, int]], name: str, said: str
) -> None:
    with pytest.raises(ProblemError, match=said) as caught:
        desk.say(Judgement("ranking", spoil(dict(desk.order(1, 2, 3, 4).ranks))))
    assert caught.value.name == name
    assert desk.recorded() == 0


def test_somebody_elses_task_is_not_there(desk: Desk, someone: Invite) -> None:
    other = Desk(desk.database, someone(), desk.assignment)
    with pytest.raises(ProblemError, match="you have no task") as caught:
        other.say(Judgement("skip"), key="k", version=0)
    assert caught.value.status == 404


def test_what_comes_after_the_end_is_late_and_not_exported_unless_asked_for(desk: Desk) -> None:
    with desk.database.write() as connection:
        batches.close(connection, "b1", now_ms())
    assert desk.say(desk.order(1, 2, 3, 4)).status == "late"
    assert desk.exported() == []
    (row,) = desk.exported(late=True)
    assert row.status == "late"


def test_a_late_edit_leaves_the_ranking_that_counts_in_the_export(desk: Desk) -> None:
    desk.say(desk.order(1, 2, 3, 4))
    with desk.database.write() as connection:
        batches.close(connection, "b1", now_ms())
    assert desk.say(desk.order(4, 3, 2, 1)).status == "late"
    (row,) = desk.exported()
    assert (row.version, row.status) == (1, "counted")
    with desk.database.read() as connection:
        assert batches.progress(connection, "b1").counted == 1


def test_a_draft_is_kept_and_renews_the_lease(desk: Desk) -> None:
    soon = now_ms() + LEASE_MS // 2
    ranks = dict(list(desk.order(1, 2, 3, 4).ranks.items())[:2])
    with desk.database.write() as connection:
        draft = wire.DraftSave(version=0, ranks=ranks, note="so far\x00")
        saved = submissions.save_draft(desk.database, connection, desk.person, desk.assignment, draft, soon)
    assert saved.lease_until == batches.stamp(soon + LEASE_MS)
    assert desk.shown.draft == Judgement("ranking", ranks, note="so far\x00")
    desk.say(desk.order(1, 2, 3, 4))
    assert desk.shown.draft is None


def test_a_draft_of_an_older_version_is_not_kept(desk: Desk) -> None:
    desk.say(desk.order(1, 2, 3, 4))
    with desk.database.write() as connection:
        draft = wire.DraftSave(version=0, ranks={}, note="old")
        submissions.save_draft(desk.database, connection, desk.person, desk.assignment, draft, now_ms())
    assert desk.shown.draft is None


def test_a_draft_does_not_take_a_place_that_somebody_else_has_now(desk: Desk, someone: Invite) -> None:
    with desk.database.write() as connection:
        connection.execute(update(assignments).values(lease_until=0))
    other = someone()
    with desk.database.write() as connection:
        assert next_assignment(connection, other, now_ms()) is not None
    with desk.database.write() as connection:
        draft = wire.DraftSave(version=0, ranks={}, note="mine")
        saved = submissions.save_draft(desk.database, connection, desk.person, desk.assignment, draft, now_ms())
    assert saved.lease_until == batches.stamp(0)
    assert desk.shown.draft is not None
