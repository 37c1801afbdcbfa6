"""Export and import of rankings as rows.

Failure modes: a row that loses a tie, a skip, the annotator or the time; a cursor that skips a ranking.
"""

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, text, update

from plaudit.ranking_service.store import leases
from plaudit.ranking_service.store.batches import (
    add_tasks,
    answer_of,
    bad_row,
    contents_of,
    first_with_the_text,
    stamp,
)
from plaudit.ranking_service.store.database import Database
from plaudit.ranking_service.store.people import note_in_audit
from plaudit.ranking_service.store.schema import annotators, answers, assignments, batches, ranks, submissions, tasks
from plaudit.wire import rankings as wire

CHUNK = 500
KINDS = {"skipped": "skip", "flagged": "flag", "withdrawn": "withdraw"}


def last_seq(database: Database) -> int:
    """The newest submission such that no older one can still appear: a safe cursor.

    On PostgreSQL, a transaction may commit a lower number after a higher one. The lock waits for open transactions.
    """
    if database.is_postgres:
        with database.write() as connection:
            connection.execute(text("LOCK TABLE submissions IN SHARE MODE"))
            return connection.execute(select(func.max(submissions.c.seq))).scalar() or 0
    with database.read() as connection:
        return connection.execute(select(func.max(submissions.c.seq))).scalar() or 0


def page(
    connection: Connection, batch: str, *, after: int, until: int, limit: int, late: bool, history: bool = False
) -> wire.RankingsPage:
    """At most `limit` rows of one batch after the cursor `after`."""
    found = connection.execute(_selected(batch, after, until, late, history).limit(limit + 1)).all()
    rows = found[:limit]
    more = len(found) > limit
    return wire.RankingsPage(rows=_rows(connection, rows), after=rows[-1].seq if more else max(after, until), more=more)


def export(
    connection: Connection, chosen: Sequence[str] | None, *, late: bool, history: bool
) -> Iterator[wire.RankingRow]:
    """All rows of the chosen batches (of every batch if None), in the order of submission."""
    after = 0
    until = connection.execute(select(func.max(submissions.c.seq))).scalar() or 0
    while True:
        found = connection.execute(_selected(chosen, after, until, late, history).limit(CHUNK)).all()
        if not found:
            return
        yield from _rows(connection, found)
        after = found[-1].seq


def import_rows(
    database: Database, connection: Connection, rows: Sequence[wire.RankingRow], now: int, *, only: str | None = None
) -> int:
    """Import the rows of a rankings file with their batches, tasks and annotators, all or none; how many were new.

    Existing rows stay as they are, so importing a file twice changes nothing.
    """
    for number, row in enumerate(rows, start=1):
        if only is not None and row.batch != only:
            raise bad_row(number, f"it belongs to batch {row.batch!r}, and this is an import to {only!r}")
    known = {batch: dict(contents_of(connection, batch)) for batch in dict.fromkeys(row.batch for row in rows)}
    people: dict[str, int] = dict(connection.execute(select(annotators.c.pseudonym, annotators.c.seq)).all())
    ids = {row.key for row in connection.execute(select(submissions.c.key))}
    added = 0
    touched: set[int] = set()
    for number, row in enumerate(rows, start=1):
        _check_order(number, row)
        _make_batch(database, connection, row, now, number)
        _make_task(connection, row, known[row.batch], number)
        if row.annotator not in people:
            people[row.annotator] = _make_annotator(connection, row.annotator, now)
        if row.id in ids:
            continue
        touched.add(_add(connection, row, people[row.annotator], number))
        ids.add(row.id)
        added += 1
    for task in sorted(touched):
        leases.update_task_state(connection, leases.lock_task(connection, task), leases.standing(connection, task))
    note_in_audit(connection, "import", only or "all", now, rows=added)
    return added


def _selected(batch: str | Sequence[str] | None, after: int, until: int, late: bool, history: bool) -> Any:
    """The newest version of each assignment, or with `history` every version; late ones only with `late`."""
    query = (
        select(
            submissions,
            assignments.c.shown_order,
            assignments.c.task,
            annotators.c.pseudonym,
            tasks.c.batch,
        )
        .join_from(submissions, assignments)
        .join(annotators, assignments.c.annotator == annotators.c.seq)
        .join(tasks, assignments.c.task == tasks.c.seq)
        .where(submissions.c.seq > after, submissions.c.seq <= until)
        .order_by(submissions.c.seq)
    )
    if batch is not None:
        query = query.where(tasks.c.batch.in_([batch] if isinstance(batch, str) else list(batch)))
    if not late:
        query = query.where(submissions.c.status != "late")
    if not history:
        newer = submissions.alias("newer")
        exists = (
            select(newer.c.seq)
            .where(newer.c.assignment == submissions.c.assignment, newer.c.version > submissions.c.version)
            .correlate(submissions)
        )
        if not late:
            exists = exists.where(newer.c.status != "late")
        query = query.where(~exists.exists())
    return query


def _rows(connection: Connection, found: Sequence[Row[Any]]) -> list[wire.RankingRow]:
    wanted = sorted({row.task for row in found})
    task_rows = {
        row.seq: row
        for row in connection.execute(
            select(tasks, batches.c.round, batches.c.purpose).join_from(tasks, batches).where(tasks.c.seq.in_(wanted))
        )
    }
    listed: dict[int, list[Row[Any]]] = {task: [] for task in wanted}
    for row in connection.execute(
        select(answers).where(answers.c.task.in_(wanted)).order_by(answers.c.task, answers.c.position)
    ):
        listed[row.task].append(row)
    given: dict[int, dict[int, int]] = {row.seq: {} for row in found}
    for row in connection.execute(select(ranks).where(ranks.c.submission.in_(list(given)))):
        given[row.submission][row.answer] = row.rank
    return [_row(row, task_rows[row.task], listed[row.task], given[row.seq]) for row in found]


def _row(row: Row[Any], task: Row[Any], listed: list[Row[Any]], given: dict[int, int]) -> wire.RankingRow:
    def rank(answer: Row[Any]) -> int:
        shown = answer if answer.same_as is None else listed[answer.same_as]
        return given[shown.seq]

    return wire.RankingRow(
        id=row.key,
        task=task.id,
        group=task.group,
        batch=task.batch,
        round=task.round,
        purpose=task.purpose,
        split=task.split,
        prompt=wire.PROMPT.validate_json(task.prompt),
        answers=[answer_of(answer) for answer in listed],
        ranks=[rank(answer) for answer in listed] if given else [],
        annotator=row.pseudonym,
        status=row.status,
        flags=json.loads(row.flags),
        note=row.note,
        seconds=row.seconds,
        shown_order=json.loads(row.shown_order),
        at=stamp(row.at),
        version=row.version,
    )


def _check_order(number: int, row: wire.RankingRow) -> None:
    shown = [i for i in range(len(row.answers)) if first_with_the_text(row.answers, i) is None]
    if sorted(row.shown_order) != shown:
        raise bad_row(number, f"shown_order {row.shown_order} is no order of the distinct answers {shown}")
    for i in range(len(row.ranks)):
        first = first_with_the_text(row.answers, i)
        if first is not None and row.ranks[first] != row.ranks[i]:
            raise bad_row(
                number,
                f"answers {first} and {i} are the same text and have ranks {row.ranks[first]} and {row.ranks[i]}",
            )


def _make_batch(database: Database, connection: Connection, row: wire.RankingRow, now: int, number: int) -> None:
    defaults = wire.BatchUpload(id=row.batch, round=row.round, purpose=row.purpose, rows=[])
    connection.execute(
        database.insert(batches)
        .values(created_at=now, **defaults.model_dump(exclude={"rows"}))
        .on_conflict_do_nothing()
    )
    there = connection.execute(select(batches).where(batches.c.id == row.batch)).one()
    for name in ("round", "purpose"):
        if getattr(there, name) != getattr(row, name):
            raise bad_row(
                number, f"batch {row.batch!r} has {name}={getattr(there, name)!r}, not {getattr(row, name)!r}"
            )


def _make_task(connection: Connection, row: wire.RankingRow, known: dict[str, Any], number: int) -> None:
    task = wire.AnswersRow(
        id=row.task, group=row.group, split=row.split, prompt=row.prompt, batch=row.batch, answers=row.answers
    )
    content = wire.content_hash(
        task.group, task.split, wire.as_json(task.prompt), [answer.model_dump() for answer in task.answers]
    )
    if row.task not in known:
        batch = connection.execute(select(batches).where(batches.c.id == row.batch)).one()
        add_tasks(connection, batch, [task], len(known))
        known[row.task] = content
    elif known[row.task] != content:
        raise bad_row(number, f"task {row.task!r} exists already with another prompt, group or answers")


def _make_annotator(connection: Connection, pseudonym: str, now: int) -> int:
    """An annotator known only from a file: without a token, nobody can sign in as them until they get a link."""
    values = {"pseudonym": pseudonym, "name": "", "role": "annotator", "created_at": now, "disabled_at": now}
    made = connection.execute(insert(annotators).values(values).returning(annotators.c.seq)).scalar_one()
    return int(made)


def _add(connection: Connection, row: wire.RankingRow, annotator: int, number: int) -> int:
    task: int = connection.execute(
        select(tasks.c.seq).where(tasks.c.batch == row.batch, tasks.c.id == row.task)
    ).scalar_one()
    at = milliseconds_of(row.at)
    there = connection.execute(
        select(assignments).where(assignments.c.task == task, assignments.c.annotator == annotator)
    ).first()
    state = "open" if row.status == "withdrawn" else row.status
    if there is None:
        identity = wire.content_hash("assignment", row.batch, row.task, row.annotator)[:24]
        connection.execute(
            insert(assignments).values(
                id=identity,
                task=task,
                annotator=annotator,
                state=state,
                version=row.version,
                lease_until=0,
                shown_order=json.dumps(row.shown_order),
                started_at=at,
            )
        )
    else:
        identity = there.id
        if json.loads(there.shown_order) != row.shown_order:
            raise bad_row(
                number, f"{row.annotator!r} saw this task in the order {there.shown_order}, not {row.shown_order}"
            )
        if row.version <= there.version:
            raise bad_row(
                number, f"{row.annotator!r} already has version {there.version} of this task, and this is {row.version}"
            )
        if row.status == "late" and there.state in ("counted", "surplus"):
            state = there.state
        connection.execute(
            update(assignments).where(assignments.c.id == identity).values(state=state, version=row.version)
        )
    seq = connection.execute(
        insert(submissions)
        .values(
            assignment=identity,
            version=row.version,
            key=row.id,
            kind=KINDS.get(row.status, "ranking"),
            status=row.status,
            flags=json.dumps(row.flags),
            note=row.note,
            seconds=row.seconds,
            at=at,
        )
        .returning(submissions.c.seq)
    ).scalar_one()
    if row.ranks:
        places = dict(
            connection.execute(
                select(answers.c.position, answers.c.seq).where(answers.c.task == task, answers.c.same_as.is_(None))
            ).all()
        )
        values = [{"submission": seq, "answer": places[i], "rank": row.ranks[i]} for i in row.shown_order]
        connection.execute(insert(ranks), values)
    return task


def milliseconds_of(at: str) -> int:
    """A row's `at` in milliseconds since 1970 in UTC."""
    whole, rest = at.removesuffix("Z").split(".")
    return int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()) * 1000 + int(rest)
