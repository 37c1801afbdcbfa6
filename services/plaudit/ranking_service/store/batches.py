"""Batches of tasks: uploads, which are stored whole or not at all, progress, closing."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store.database import Database
from plaudit.ranking_service.store.people import note_in_audit
from plaudit.ranking_service.store.schema import answers, assignments, batches, submissions, tasks
from plaudit.wire import rankings as wire

FIXED = ("round", "purpose", "overlap", "overlap_share", "instructions")
"""Settings that are fixed when a batch is created. Every later upload must repeat them."""
ROWS_AT_ONCE = 500


def upload(
    database: Database, connection: Connection, wanted: wire.BatchUpload, now: int, *, actor: int | None = None
) -> wire.BatchUploaded:
    """Create the batch unless it exists, and add the new rows. Raises `ProblemError` for the first bad row."""
    for number, row in enumerate(wanted.rows, start=1):
        if row.batch != wanted.id:
            raise bad_row(number, f"it belongs to batch {row.batch!r}, and this is an upload to {wanted.id!r}")
    settings = {name: getattr(wanted, name) for name in FIXED}
    connection.execute(
        database.insert(batches).values(id=wanted.id, created_at=now, **settings).on_conflict_do_nothing()
    )
    # The lock makes uploads to one batch wait for each other.
    batch = connection.execute(select(batches).where(batches.c.id == wanted.id).with_for_update()).one()
    for name, value in settings.items():
        if getattr(batch, name) != value:
            there = getattr(batch, name)
            raise ProblemError(
                "batch-differs", f"batch {wanted.id!r} exists with {name}={there!r}, and the upload has {value!r}"
            )
    if batch.closed_at is not None:
        raise ProblemError("batch-closed", f"batch {wanted.id!r} is closed; reopen it or name another")
    known = _contents(connection, wanted.id)
    count = len(known)
    added: list[wire.AnswersRow] = []
    for number, row in enumerate(wanted.rows, start=1):
        content = _content(row)
        if row.id not in known:
            known[row.id] = content
            added.append(row)
        elif known[row.id] != content:
            raise bad_row(number, f"task {row.id!r} exists already with another prompt, group or answers")
    merged, identical = add_tasks(connection, batch, added, count)
    if added:
        note_in_audit(connection, "upload", wanted.id, now, actor=actor, added=len(added))
    return wire.BatchUploaded(
        id=wanted.id,
        added=len(added),
        known=len(wanted.rows) - len(added),
        merged_answers=merged,
        identical=identical,
        tasks=count + len(added),
    )


def add_tasks(connection: Connection, batch: Row[Any], rows: list[wire.AnswersRow], count: int) -> tuple[int, int]:
    """Append tasks to the `count` existing ones. Returns the number of merged answers and of identical tasks."""
    merged = identical = 0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        task_rows = []
        for offset, row in enumerate(chunk, start=count + start):
            distinct = len({answer.text for answer in row.answers})
            merged += len(row.answers) - distinct
            identical += distinct == 1
            task_rows.append(
                {
                    "batch": batch.id,
                    "id": row.id,
                    "group": row.group,
                    "split": row.split,
                    "prompt": json.dumps(wire.as_json(row.prompt)),
                    "position": offset,
                    "wanted": batch.overlap if overlaps(offset, batch.overlap_share) else 1,
                    "state": "identical" if distinct == 1 else "open",
                }
            )
        connection.execute(insert(tasks), task_rows)
        seqs = _seqs_of(connection, batch.id, [row.id for row in chunk])
        answer_rows = [
            {
                "task": seqs[row.id],
                "position": position,
                "id": answer.id,
                "text": answer.text,
                "policy": answer.policy,
                "revision": answer.revision,
                "seed": None if answer.seed is None else str(answer.seed),
                "same_as": first_with_the_text(row.answers, position),
            }
            for row in chunk
            for position, answer in enumerate(row.answers)
        ]
        connection.execute(insert(answers), answer_rows)
    return merged, identical


def overlaps(position: int, share: float) -> bool:
    """Whether several people rank the task at this position: the first one, and `share` of all, evenly spread."""
    return math.ceil((position + 1) * share) > math.ceil(position * share)


def first_with_the_text(listed: list[wire.Answer], position: int) -> int | None:
    """The position of the first answer with the same text; None if it is this one."""
    first = next(i for i, answer in enumerate(listed) if answer.text == listed[position].text)
    return None if first == position else first


def close(connection: Connection, identity: str, now: int, *, actor: int | None = None) -> None:
    """Close a batch: none of its tasks is handed out, and later rankings are kept as late. Idempotent."""
    _must_exist(connection, identity)
    open_one = (batches.c.id == identity) & batches.c.closed_at.is_(None)
    if connection.execute(update(batches).where(open_one).values(closed_at=now)).rowcount:
        note_in_audit(connection, "close", identity, now, actor=actor)


def reopen(connection: Connection, identity: str, now: int, *, actor: int | None = None) -> None:
    """Reopen a batch: its tasks are handed out again. Late rankings stay late."""
    _must_exist(connection, identity)
    closed_one = (batches.c.id == identity) & batches.c.closed_at.is_not(None)
    if connection.execute(update(batches).where(closed_one).values(closed_at=None)).rowcount:
        note_in_audit(connection, "reopen", identity, now, actor=actor)


def progress(connection: Connection, identity: str) -> wire.BatchProgress:
    """The progress of a batch."""
    batch = connection.execute(select(batches).where(batches.c.id == identity)).first()
    if batch is None:
        raise ProblemError("not-found", f"there is no batch {identity!r}")
    states: dict[str, int] = dict(
        connection.execute(
            select(tasks.c.state, func.count()).where(tasks.c.batch == identity).group_by(tasks.c.state)
        ).all()
    )
    wanted = connection.execute(
        select(func.sum(tasks.c.wanted)).where(tasks.c.batch == identity, tasks.c.state.in_(("open", "done")))
    ).scalar()
    of_batch = assignments.join(tasks, assignments.c.task == tasks.c.seq)
    done: dict[str, int] = dict(
        connection.execute(
            select(assignments.c.state, func.count())
            .select_from(of_batch)
            .where(tasks.c.batch == identity)
            .group_by(assignments.c.state)
        ).all()
    )
    people = connection.execute(
        select(func.count(assignments.c.annotator.distinct()))
        .select_from(of_batch)
        .where(tasks.c.batch == identity, assignments.c.state.in_(("counted", "surplus", "late")))
    ).scalar()
    last = connection.execute(
        select(func.max(submissions.c.seq))
        .select_from(submissions.join(of_batch, submissions.c.assignment == assignments.c.id))
        .where(tasks.c.batch == identity)
    ).scalar()
    return wire.BatchProgress(
        id=identity,
        round=batch.round,
        purpose=batch.purpose,
        overlap=batch.overlap,
        overlap_share=batch.overlap_share,
        created_at=stamp(batch.created_at),
        closed_at=None if batch.closed_at is None else stamp(batch.closed_at),
        complete=not states.get("open"),
        tasks=sum(states.values()),
        **{name: states.get(name, 0) for name in ("open", "done", "parked", "identical")},
        wanted=wanted or 0,
        **{name: done.get(name, 0) for name in ("counted", "surplus", "late", "skipped", "flagged")},
        annotators=people or 0,
        last_seq=last or 0,
    )


def listed(connection: Connection) -> list[str]:
    """The ids of all batches, the newest first."""
    rows = connection.execute(select(batches.c.id).order_by(batches.c.created_at.desc(), batches.c.id.desc()))
    return list(rows.scalars())


def stamp(milliseconds: int) -> str:
    """2026-01-31T12:34:56.789Z"""
    whole, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def bad_row(number: int, reason: str) -> ProblemError:
    """The refusal of an upload for its row `number`, counted from 1."""
    return ProblemError("invalid-row", f"row {number}: {reason}; nothing was taken", row=number)


def contents_of(connection: Connection, batch: str) -> Mapping[str, object]:
    """A hash of the content of every task of a batch, by the task's id."""
    return _contents(connection, batch)


def _content(row: wire.AnswersRow) -> str:
    return wire.content_hash(
        row.group, row.split, wire.as_json(row.prompt), [answer.model_dump() for answer in row.answers]
    )


def _contents(connection: Connection, batch: str) -> dict[str, str]:
    found: dict[int, tuple[Row[Any], list[dict[str, Any]]]] = {
        row.seq: (row, []) for row in connection.execute(select(tasks).where(tasks.c.batch == batch))
    }
    rows = connection.execute(
        select(answers)
        .join_from(answers, tasks)
        .where(tasks.c.batch == batch)
        .order_by(answers.c.task, answers.c.position)
    )
    for row in rows:
        found[row.task][1].append(answer_of(row).model_dump())
    return {
        task.id: wire.content_hash(task.group, task.split, json.loads(task.prompt), listed)
        for task, listed in found.values()
    }


def answer_of(row: Row[Any]) -> wire.Answer:
    """A stored answer as a message."""
    seed = None if row.seed is None else int(row.seed)
    return wire.Answer(id=row.id, text=row.text, policy=row.policy, revision=row.revision, seed=seed)


def _seqs_of(connection: Connection, batch: str, ids: list[str]) -> dict[str, int]:
    rows = connection.execute(select(tasks.c.id, tasks.c.seq).where(tasks.c.batch == batch, tasks.c.id.in_(ids)))
    return dict(rows.all())


def _must_exist(connection: Connection, identity: str) -> None:
    if connection.execute(select(batches.c.id).where(batches.c.id == identity)).first() is None:
        raise ProblemError("not-found", f"there is no batch {identity!r}")
