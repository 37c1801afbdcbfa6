"""Uploads, whole or not at all, on both databases."""

from typing import Any

import pytest
from sqlalchemy import func, select

from harness.ranking_service import rows, upload
from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import batches
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.schema import tasks
from plaudit.wire import rankings as wire


def send(database: Database, listed: list[wire.AnswersRow], **settings: Any) -> wire.BatchUploaded:
    with database.write() as connection:
        return batches.upload(database, connection, upload(listed, **settings), now_ms())


def count(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(select(func.count()).select_from(tasks)).scalar_one())


def test_uploading_twice_is_harmless_and_more_rows_can_follow(database: Database) -> None:
    assert send(database, rows(3)).added == 3
    again = send(database, rows(5))
    assert (again.added, again.known, again.tasks) == (2, 3, 5)


def test_a_row_that_is_there_with_other_answers_is_refused_and_nothing_is_taken(database: Database) -> None:
    send(database, rows(1))
    changed = rows(1)[0].model_copy(update={"answers": rows(1, k=3)[0].answers})
    with pytest.raises(ProblemError, match=r"row 3: task .* exists already with another prompt") as caught:
        send(database, [*rows(3)[1:], changed])
    assert caught.value.extra == {"row": 3}
    assert count(database) == 1


def test_a_row_of_another_batch_is_refused_with_its_number(database: Database) -> None:
    with pytest.raises(ProblemError, match=r"row 2: it belongs to batch 'b2'.*upload to 'b1'"):
        send(database, [rows(1)[0], rows(1, batch="b2")[0]], id="b1")
    assert count(database) == 0


def test_an_upload_that_names_other_settings_is_refused(database: Database) -> None:
    send(database, rows(1), overlap=3)
    with pytest.raises(ProblemError, match="exists with overlap=3, and the upload has 5"):
        send(database, rows(2), overlap=5)


def test_a_closed_batch_takes_no_rows(database: Database) -> None:
    send(database, rows(1))
    with database.write() as connection:
        batches.close(connection, "b1", now_ms())
        batches.close(connection, "b1", now_ms())
    with pytest.raises(ProblemError, match="is closed; reopen it"):
        send(database, rows(2))


def test_answers_with_the_same_text_are_merged_and_identical_ones_ask_nobody(database: Database) -> None:
    same = [wire.new_answer(text, policy=policy) for policy, text in (("a", "x"), ("b", "y"), ("c", "x"))]
    all_the_same = [wire.new_answer("x", policy=policy) for policy in ("a", "b")]
    told = send(database, [wire.new_answers_row("b1", "one", same), wire.new_answers_row("b1", "two", all_the_same)])
    assert (told.merged_answers, told.identical) == (2, 1)
    with database.read() as connection:
        progress = batches.progress(connection, "b1")
    assert (progress.identical, progress.open, progress.tasks) == (1, 1, 2)


def test_there_is_no_progress_of_a_batch_that_is_not_there(database: Database) -> None:
    with database.read() as connection, pytest.raises(ProblemError, match="there is no batch 'nope'"):
        batches.progress(connection, "nope")


@pytest.mark.parametrize(
    "text", ["NUL \x00 here", "\x01 0", "\x010", "\x01\x00\x011", "\u202eover\u202c", "👩‍🔬" * 100]
)
def test_any_text_comes_back_as_it_was(database: Database, text: str) -> None:
    row = wire.new_answers_row("b1", text, [wire.new_answer(text, seed=2**80), wire.new_answer("other")])
    send(database, [row])
    again = send(database, [row])
    assert again.known == 1
