"""Who gets which task, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text

from harness.machine.postgres import PostgresServer
from harness.ranking_service import Fill, Invite, rows, upload
from plaudit.ranking_service.store import batches, leases, people, submissions
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.store.leases import LEASE_MS
from plaudit.ranking_service.store.schema import assignments, tasks
from plaudit.ranking_service.store.submissions import Judgement
from plaudit.wire import rankings as wire


def take(database: Database, person: int, now: int | None = None) -> str | None:
    with database.write() as connection:
        return leases.next_assignment(connection, person, now or now_ms())


def rank(database: Database, person: int, assignment: str, now: int | None = None) -> wire.Accepted:
    with database.read() as connection:
        shown = submissions.show(connection, person, assignment)
    word = Judgement("ranking", {answer.id: place for place, answer in enumerate(shown.answers, start=1)})
    with database.write() as connection:
        return submissions.submit(
            database, connection, person, assignment, shown.key, shown.version, word, now or now_ms()
        )


def skip(database: Database, person: int, assignment: str) -> wire.Accepted:
    with database.write() as connection:
        return submissions.submit(database, connection, person, assignment, "skip", 0, Judgement("skip"), now_ms())


def task_of(database: Database, person: int, assignment: str) -> str:
    with database.read() as connection:
        return submissions.show(connection, person, assignment).task


def progress(database: Database) -> wire.BatchProgress:
    with database.read() as connection:
        return batches.progress(connection, "b1")


def test_a_fifth_of_the_tasks_and_always_the_first_are_ranked_by_several_people() -> None:
    chosen = [position for position in range(100) if batches.overlaps(position, 0.2)]
    assert chosen == list(range(0, 100, 5))
    assert [p for p in range(5) if batches.overlaps(p, 1.0)] == [0, 1, 2, 3, 4]
    assert not any(batches.overlaps(p, 0.0) for p in range(100))


def test_nobody_gets_a_task_twice_and_a_task_gets_as_many_people_as_it_wants(
    database: Database, fill: Fill, someone: Invite
) -> None:
    fill(5, overlap=2, overlap_share=0.2)
    seen: dict[str, int] = {}
    for person in [someone() for _ in range(4)]:
        mine = []
        while (assignment := take(database, person)) is not None:
            mine.append(task_of(database, person, assignment))
            rank(database, person, assignment)
        assert len(set(mine)) == len(mine)
        for task in mine:
            seen[task] = seen.get(task, 0) + 1
    assert sorted(seen.values()) == [1, 1, 1, 1, 2]
    assert progress(database).complete


def test_asking_again_gives_the_same_task_until_it_is_done(database: Database, fill: Fill, someone: Invite) -> None:
    fill(3, overlap_share=0)
    person = someone()
    first = take(database, person)
    assert first is not None
    assert take(database, person) == first
    rank(database, person, first)
    assert take(database, person) not in (first, None)


def test_a_lease_that_ends_frees_the_place_and_a_task_is_not_lost(
    database: Database, fill: Fill, someone: Invite
) -> None:
    fill(1, overlap_share=0)
    gone, here = someone(), someone()
    now = now_ms()
    assert take(database, gone, now) is not None
    assert take(database, here, now) is None
    with database.read() as connection:
        assert leases.anything_left(connection, here)
    assert take(database, here, now + LEASE_MS + 1) is not None


def test_a_submit_after_the_lease_is_kept_if_there_is_room_and_is_surplus_if_not(
    database: Database, fill: Fill, someone: Invite
) -> None:
    fill(1, overlap_share=0)
    slow, quick = someone(), someone()
    now = now_ms()
    late = take(database, slow, now)
    assert late is not None
    after = now + LEASE_MS + 1
    other = take(database, quick, after)
    assert other is not None
    assert rank(database, slow, late, after).status == "surplus"
    assert rank(database, quick, other, after).status == "counted"


def test_a_submit_after_the_lease_counts_if_nobody_has_taken_the_place(
    database: Database, fill: Fill, someone: Invite
) -> None:
    fill(1, overlap_share=0)
    slow = someone()
    now = now_ms()
    late = take(database, slow, now)
    assert late is not None
    assert rank(database, slow, late, now + LEASE_MS + 1).status == "counted"


def test_a_skip_frees_the_place_for_somebody_else(database: Database, fill: Fill, someone: Invite) -> None:
    fill(1, overlap_share=0)
    one, other = someone(), someone()
    assignment = take(database, one)
    assert assignment is not None
    assert skip(database, one, assignment).status == "skipped"
    assert take(database, one) is None
    assert take(database, other) is not None


def test_three_skips_park_a_task(database: Database, fill: Fill, someone: Invite) -> None:
    fill(1, overlap_share=0)
    for person in [someone() for _ in range(3)]:
        assignment = take(database, person)
        assert assignment is not None
        skip(database, person, assignment)
    assert take(database, someone()) is None
    assert (progress(database).parked, progress(database).complete) == (1, True)


def test_taking_a_skip_back_unparks_the_task(database: Database, fill: Fill, someone: Invite) -> None:
    fill(1, overlap_share=0)
    people = [someone() for _ in range(3)]
    for person in people:
        assignment = take(database, person)
        assert assignment is not None
        skip(database, person, assignment)
    assert assignment is not None
    with database.write() as connection:
        submissions.submit(database, connection, person, assignment, "undo", 1, Judgement("withdraw"), now_ms())
    assert progress(database).parked == 0
    assert take(database, person) == assignment


def test_a_closed_batch_hands_out_nothing(database: Database, fill: Fill, someone: Invite) -> None:
    fill(2)
    with database.write() as connection:
        batches.close(connection, "b1", now_ms())
    assert take(database, someone()) is None
    with database.write() as connection:
        batches.reopen(connection, "b1", now_ms())
    assert take(database, someone()) is not None


def test_the_oldest_batch_is_handed_out_first(database: Database, someone: Invite) -> None:
    for now, name in enumerate(("z", "a"), start=1):
        with database.write() as connection:
            batches.upload(database, connection, upload(rows(1, batch=name)), now)
    person = someone()
    found = []
    while (assignment := take(database, person)) is not None:
        with database.read() as connection:
            found.append(submissions.show(connection, person, assignment).batch)
        rank(database, person, assignment)
    assert found == ["z", "a"]


def test_the_order_shown_is_drawn_for_each_person_and_kept(database: Database, fill: Fill, someone: Invite) -> None:
    fill(1, overlap=40, overlap_share=1)
    orders = set()
    for person in [someone() for _ in range(12)]:
        assignment = take(database, person)
        assert assignment is not None
        with database.read() as connection:
            first = submissions.show(connection, person, assignment).answers
            assert submissions.show(connection, person, assignment).answers == first
        orders.add(tuple(answer.id for answer in first))
    assert len(orders) > 1


def test_twenty_people_at_once_never_go_over_the_overlap(database: Database, fill: Fill, someone: Invite) -> None:
    fill(20, overlap=3, overlap_share=0.2)
    people = [someone() for _ in range(20)]
    begin = threading.Barrier(len(people))

    def work(person: int) -> list[str]:
        begin.wait(timeout=60)
        done = []
        while (assignment := take(database, person)) is not None:
            assert rank(database, person, assignment).status == "counted"
            done.append(task_of(database, person, assignment))
        return done

    with ThreadPoolExecutor(len(people)) as pool:
        done = list(pool.map(work, people))
    assert all(len(set(mine)) == len(mine) for mine in done)
    told = progress(database)
    assert (told.counted, told.wanted, told.surplus) == (28, 28, 0)


@pytest.mark.parametrize("answers", [2, 9])
def test_two_to_nine_answers_can_be_ranked(database: Database, someone: Invite, answers: int) -> None:
    with database.write() as connection:
        batches.upload(database, connection, upload(rows(1, k=answers)), now_ms())
    person = someone()
    assignment = take(database, person)
    assert assignment is not None
    assert rank(database, person, assignment).status == "counted"


def test_looking_and_submitting_at_once_do_not_wait_for_each_other(postgres: PostgresServer) -> None:
    database = Database(postgres.url())
    database.migrate()
    with database.write() as connection:
        batches.upload(database, connection, upload(rows(1)), now_ms())
        _, token = people.invite(connection, wire.Invite(), now_ms())
        person = people.by_token(connection, token)
    assert person is not None
    assignment = take(database, person.seq)
    assert assignment is not None
    stale = now_ms() + LEASE_MS // 2
    looking = threading.Thread(target=take, args=(database, person.seq, stale))
    with database.write() as connection:  # as a submission does: the assignment first, then the task
        connection.execute(select(assignments).where(assignments.c.id == assignment).with_for_update())
        looking.start()
        while not connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted")).scalar():
            pass
        leases.lock_task(connection, connection.execute(select(tasks.c.seq)).scalar_one())
    looking.join()
    database.close()
