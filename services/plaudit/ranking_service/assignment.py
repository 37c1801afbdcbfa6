"""Who ranks what: a task is leased to one person at a time for each of its places, and nobody gets it twice.

A lease is a place that is kept for 15 minutes. Wrong here would be two people in one place, or a place that stays taken
by somebody who has left.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, exists, func, insert, or_, select, update

from plaudit.ranking_service.schema import answers, assignments, batches, tasks

LEASE_MS = 15 * 60 * 1000
PARK_AFTER_SKIPS = 3
"""Skips and flags, by different people, after which nobody else is asked."""
RENEW_AFTER_MS = 60 * 1000
"""A lease this fresh is left as it is, so that showing a page again writes nothing."""

RANDOM = secrets.SystemRandom()


def next_assignment(connection: Connection, annotator: int, now: int) -> str | None:
    """The assignment that this person should see now, its lease renewed; None when there is nothing for them."""
    for row in _own_open(connection, annotator):
        if renew(connection, row.id, row.task, now):
            return str(row.id)
    open_batches = select(batches.c.id).where(batches.c.closed_at.is_(None))
    for batch in connection.execute(open_batches.order_by(batches.c.created_at, batches.c.id)).scalars().all():
        tried: list[int] = []
        while (task := connection.execute(_free_task(batch, annotator, now, tried)).first()) is not None:
            # The query saw the tasks as they were before it had the lock: count again.
            if places_taken(connection, task.seq, now) < task.wanted:
                return _assign(connection, task.seq, annotator, now)
            tried.append(task.seq)
    return None


def anything_left(connection: Connection, annotator: int) -> bool:
    """Whether there are open tasks that this person has not seen: held by others now, they may come free."""
    query = select(tasks.c.seq).join_from(tasks, batches).where(batches.c.closed_at.is_(None))
    query = query.where(tasks.c.state == "open", _unseen(annotator)).limit(1)
    return connection.execute(query).first() is not None


def renew(connection: Connection, assignment: str, task: int, now: int) -> bool:
    """Keep the place for another 15 minutes, or take it again if the lease has ended and there is room."""
    row = lock_task(connection, task)
    if row.state == "parked" or _batch_closed(connection, row.batch):
        return False
    if places_taken(connection, task, now, without=assignment) >= row.wanted:
        return False
    stale = assignments.c.lease_until < now + LEASE_MS - RENEW_AFTER_MS
    connection.execute(
        update(assignments)
        .where(assignments.c.id == assignment, assignments.c.state == "open", stale)
        .values(lease_until=now + LEASE_MS)
    )
    return True


def lock_task(connection: Connection, task: int) -> Row[Any]:
    """The task's row, which nobody else changes until this transaction ends."""
    return connection.execute(select(tasks).where(tasks.c.seq == task).with_for_update()).one()


def places_taken(connection: Connection, task: int, now: int, *, without: str | None = None) -> int:
    """Places with a ranking that counts or a lease that runs."""
    query = select(func.count()).select_from(assignments).where(assignments.c.task == task, _takes_a_place(now))
    if without is not None:
        query = query.where(assignments.c.id != without)
    return int(connection.execute(query).scalar_one())


def settle(connection: Connection, task: Row[Any]) -> None:
    """Write down whether the (locked) task is done, parked or open, from its assignments."""
    if task.state == "identical":
        return
    states: dict[str, int] = dict(
        connection.execute(
            select(assignments.c.state, func.count())
            .where(assignments.c.task == task.seq)
            .group_by(assignments.c.state)
        ).all()
    )
    if states.get("counted", 0) >= task.wanted:
        state = "done"
    elif states.get("skipped", 0) + states.get("flagged", 0) >= PARK_AFTER_SKIPS:
        state = "parked"
    else:
        state = "open"
    if state != task.state:
        connection.execute(update(tasks).where(tasks.c.seq == task.seq).values(state=state))


def _own_open(connection: Connection, annotator: int) -> Sequence[Row[str, int]]:
    return connection.execute(
        select(assignments.c.id, assignments.c.task)
        .join_from(assignments, tasks)
        .join(batches, tasks.c.batch == batches.c.id)
        .where(assignments.c.annotator == annotator, assignments.c.state == "open")
        .where(batches.c.closed_at.is_(None), tasks.c.state == "open")
        .order_by(assignments.c.lease_until.desc(), assignments.c.id)
    ).all()


def _takes_a_place(now: int) -> Any:
    leased = and_(assignments.c.state == "open", assignments.c.lease_until > now)
    return or_(assignments.c.state == "counted", leased)


def _unseen(annotator: int) -> Any:
    return ~exists().where(assignments.c.task == tasks.c.seq, assignments.c.annotator == annotator)


def _free_task(batch: str, annotator: int, now: int, without: list[int]) -> Select[tuple[int, int]]:
    taken = (
        select(func.count())
        .select_from(assignments)
        .where(assignments.c.task == tasks.c.seq, _takes_a_place(now))
        .scalar_subquery()
    )
    return (
        select(tasks.c.seq, tasks.c.wanted)
        .where(tasks.c.batch == batch, tasks.c.state == "open", _unseen(annotator))
        .where(taken < tasks.c.wanted, tasks.c.seq.not_in(without))
        .order_by(tasks.c.position)
        .limit(1)
        .with_for_update(skip_locked=True)
    )


def _batch_closed(connection: Connection, batch: str) -> bool:
    return connection.execute(select(batches.c.closed_at).where(batches.c.id == batch)).scalar_one() is not None


def _assign(connection: Connection, task: int, annotator: int, now: int) -> str:
    shown = list(
        connection.execute(
            select(answers.c.position)
            .where(answers.c.task == task, answers.c.same_as.is_(None))
            .order_by(answers.c.position)
        ).scalars()
    )
    RANDOM.shuffle(shown)
    identity = secrets.token_hex(12)
    connection.execute(
        insert(assignments).values(
            id=identity,
            task=task,
            annotator=annotator,
            state="open",
            version=0,
            lease_until=now + LEASE_MS,
            shown_order=json.dumps(shown),
            started_at=now,
        )
    )
    return identity
