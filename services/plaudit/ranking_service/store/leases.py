"""Assigning tasks to people by leases. A task needs a number of rankings; nobody gets the same task twice.

A lease reserves one of these rankings for a person for 15 minutes.

Failure modes: two people share one reservation; a reservation stays with a person who has left.
"""

import json
import secrets
from collections.abc import Mapping
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, and_, bindparam, exists, func, insert, or_, select, update

from plaudit.ranking_service.store.schema import answers, assignments, batches, tasks

LEASE_MS = 15 * 60 * 1000
PARK_AFTER_SKIPS = 3
"""Skips and flags by different people after which the task is parked: nobody else is asked."""
RENEW_AFTER_MS = 60 * 1000
"""A lease younger than this is not renewed, so that reloading a page writes nothing."""

RANDOM = secrets.SystemRandom()


# Built once: building a statement takes as long as running it.
_unseen = ~exists().where(assignments.c.task == tasks.c.seq, assignments.c.annotator == bindparam("annotator"))
_takes_a_place = or_(
    assignments.c.state == "counted",
    and_(assignments.c.state == "open", assignments.c.lease_until > bindparam("now")),
)
_OWN_OPEN = (
    select(assignments.c.id, assignments.c.task)
    .join_from(assignments, tasks)
    .join(batches, tasks.c.batch == batches.c.id)
    .where(assignments.c.annotator == bindparam("annotator"), assignments.c.state == "open")
    .where(batches.c.closed_at.is_(None), tasks.c.state == "open")
    .order_by(assignments.c.lease_until.desc(), assignments.c.id)
)
_OPEN_BATCHES = select(batches.c.id).where(batches.c.closed_at.is_(None)).order_by(batches.c.created_at, batches.c.id)
_FREE_TASK = (
    select(tasks.c.seq, tasks.c.wanted)
    .where(tasks.c.batch == bindparam("batch"), tasks.c.state == "open", _unseen)
    .where(
        select(func.count())
        .select_from(assignments)
        .where(assignments.c.task == tasks.c.seq, _takes_a_place)
        .scalar_subquery()
        < tasks.c.wanted
    )
    .where(tasks.c.seq.not_in(bindparam("tried", expanding=True)))
    .order_by(tasks.c.position)
    .limit(1)
    .with_for_update(skip_locked=True)
)
_SOMETHING_LEFT = (
    select(tasks.c.seq)
    .join_from(tasks, batches)
    .where(batches.c.closed_at.is_(None), tasks.c.state == "open", _unseen)
    .limit(1)
)
_LOCK_TASK = (
    select(tasks, batches.c.closed_at)
    .join_from(tasks, batches)
    .where(tasks.c.seq == bindparam("task"))
    .with_for_update(of=tasks)
)
_LOCK_ASSIGNMENT = select(assignments.c.id).where(assignments.c.id == bindparam("assignment")).with_for_update()
_STANDING = select(assignments.c.id, assignments.c.state, assignments.c.lease_until).where(
    assignments.c.task == bindparam("task")
)
_SHOWN_POSITIONS = (
    select(answers.c.position)
    .where(answers.c.task == bindparam("task"), answers.c.same_as.is_(None))
    .order_by(answers.c.position)
)

Standing: TypeAlias = Mapping[str, tuple[str, int]]
"""All assignments of one task: each one's state, and when its lease expires."""


def next_assignment(connection: Connection, annotator: int, now: int) -> str | None:
    """The assignment to show to this person, with its lease renewed; None if there is nothing for them."""
    for row in connection.execute(_OWN_OPEN, {"annotator": annotator}).all():
        if renew(connection, row.id, row.task, now):
            return str(row.id)
    for batch in connection.execute(_OPEN_BATCHES).scalars().all():
        wanted = {"batch": batch, "annotator": annotator, "now": now}
        tried: list[int] = []
        while (task := connection.execute(_FREE_TASK, wanted | {"tried": tried}).first()) is not None:
            # The query read the tasks before it had the lock: count again.
            if places_taken(standing(connection, task.seq), now) < task.wanted:
                return _assign(connection, task.seq, annotator, now)
            tried.append(task.seq)
    return None


def anything_left(connection: Connection, annotator: int) -> bool:
    """Whether there are open tasks that this person has not seen: others hold them now, but may give them up."""
    return connection.execute(_SOMETHING_LEFT, {"annotator": annotator}).first() is not None


def renew(connection: Connection, assignment: str, task: int, now: int) -> bool:
    """Renew the lease for 15 minutes, or take it again if it has expired and the task still needs a ranking."""
    # The assignment is locked first, as in a submission: another order could deadlock.
    connection.execute(_LOCK_ASSIGNMENT, {"assignment": assignment})
    row = lock_task(connection, task)
    if row.state == "parked" or row.closed_at is not None:
        return False
    there = standing(connection, task)
    if places_taken(there, now, without=assignment) >= row.wanted:
        return False
    if there[assignment][1] < now + LEASE_MS - RENEW_AFTER_MS:
        connection.execute(
            update(assignments)
            .where(assignments.c.id == assignment, assignments.c.state == "open")
            .values(lease_until=now + LEASE_MS)
        )
    return True


def lock_task(connection: Connection, task: int) -> Row[Any]:
    """The task's row, locked until this transaction ends, and the time at which its batch was closed."""
    return connection.execute(_LOCK_TASK, {"task": task}).one()


def standing(connection: Connection, task: int) -> Standing:
    """All assignments of the (locked) task."""
    rows = connection.execute(_STANDING, {"task": task})
    return {row.id: (row.state, row.lease_until) for row in rows}


def places_taken(there: Standing, now: int, *, without: str | None = None) -> int:
    """The number of rankings that count, and of leases that have not expired."""
    return sum(
        state == "counted" or (state == "open" and lease_until > now)
        for identity, (state, lease_until) in there.items()
        if identity != without
    )


def update_task_state(connection: Connection, task: Row[Any], there: Standing) -> None:
    """Store whether the (locked) task is done, parked or open, from all its assignments."""
    if task.state == "identical":
        return
    states = [state for state, _ in there.values()]
    if states.count("counted") >= task.wanted:
        state = "done"
    elif states.count("skipped") + states.count("flagged") >= PARK_AFTER_SKIPS:
        state = "parked"
    else:
        state = "open"
    if state != task.state:
        connection.execute(update(tasks).where(tasks.c.seq == task.seq).values(state=state))


def _assign(connection: Connection, task: int, annotator: int, now: int) -> str:
    shown = list(connection.execute(_SHOWN_POSITIONS, {"task": task}).scalars())
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
