"""Submissions: rankings, skips, flags and withdrawals. Each is a new version; nothing is overwritten.

Sending the same submission twice, under one key or from two tabs, makes one version. Two different edits of one version
make one version, and a conflict that shows both.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store import leases
from plaudit.ranking_service.store.batches import stamp
from plaudit.ranking_service.store.database import Database
from plaudit.ranking_service.store.schema import answers, assignments, batches, drafts, ranks, submissions, tasks
from plaudit.wire import rankings as wire

Kind = Literal["ranking", "skip", "flag", "withdraw"]
MAX_SECONDS = 24 * 3600.0

# Built once: building a statement takes as long as running it.
_ASSIGNMENT = select(assignments).where(
    assignments.c.id == bindparam("identity"), assignments.c.annotator == bindparam("annotator")
)
_LOCK_ASSIGNMENT = _ASSIGNMENT.with_for_update()
_SHOWN_ANSWERS = select(answers).where(answers.c.task == bindparam("task"), answers.c.same_as.is_(None))
_TASK = select(tasks, batches.c.instructions).join_from(tasks, batches).where(tasks.c.seq == bindparam("task"))
_DRAFT = select(drafts).where(drafts.c.assignment == bindparam("assignment"))
_FORGET_DRAFT = delete(drafts).where(drafts.c.assignment == bindparam("assignment"))


@dataclass(frozen=True)
class Judgement:
    """A person's judgement of a task."""

    kind: Kind
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By answer id, as submitted; gaps are closed when they are stored."""
    flags: tuple[str, ...] = ()
    note: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class ShownTask:
    """A task as one person sees it, with their judgement so far."""

    assignment: str
    state: str
    task: str
    batch: str
    instructions: str
    prompt: str | list[wire.Turn]
    answers: list[wire.ShownAnswer]
    version: int
    lease_until: int
    current: Judgement | None
    """The newest version, unless it is a withdrawal."""
    draft: Judgement | None

    @property
    def key(self) -> str:
        """The key of the next submission: the same in all tabs that show this version."""
        return wire.content_hash("key", self.assignment, self.version)


class ConflictError(ProblemError):
    """Another submission came first, most likely from the same person in another tab."""

    def __init__(self, name: str, detail: str, shown: ShownTask, theirs: Judgement) -> None:
        recorded = shown.current
        super().__init__(
            name,
            detail,
            version=shown.version,
            recorded=None if recorded is None else {"kind": recorded.kind, "ranks": dict(recorded.ranks)},
            sent={"kind": theirs.kind, "ranks": dict(theirs.ranks)},
        )
        self.shown = shown
        self.theirs = theirs


def show(connection: Connection, annotator: int, assignment: str) -> ShownTask:
    """One of the person's own assignments."""
    row = _assignment(connection, annotator, assignment)
    task = connection.execute(_TASK, {"task": row.task}).one()
    by_position = {a.position: a for a in _shown_answers(connection, row.task)}
    current = _version(connection, row, row.version) if row.version else None
    draft = connection.execute(_DRAFT, {"assignment": row.id}).first()
    return ShownTask(
        assignment=row.id,
        state=row.state,
        task=task.id,
        batch=task.batch,
        instructions=task.instructions,
        prompt=wire.PROMPT.validate_json(task.prompt),
        answers=[
            wire.ShownAnswer(id=by_position[position].id, text=by_position[position].text)
            for position in json.loads(row.shown_order)
        ],
        version=row.version,
        lease_until=row.lease_until,
        current=None if current is None or current.kind == "withdraw" else current,
        draft=None if draft is None else Judgement("ranking", json.loads(draft.ranks), note=draft.note),
    )


def submit(
    database: Database,
    connection: Connection,
    annotator: int,
    assignment: str,
    key: str,
    version: int,
    word: Judgement,
    now: int,
) -> wire.Accepted:
    """Store a new version of this person's judgement of the task.

    Raises:
        ConflictError: another version came first, or the key was used for another judgement.
        ProblemError: the ranking names an unknown answer, or leaves one out.
    """
    row = _assignment(connection, annotator, assignment, lock=True)
    stored_key = wire.content_hash("submission", assignment, key)
    if row.version:
        replayed = connection.execute(select(submissions).where(submissions.c.key == stored_key)).first()
        if replayed is not None:
            return _replay(connection, annotator, row, replayed, word)
    if version != row.version:
        return _from_another_tab(connection, annotator, row, version, word)
    by_id = {answer.id: answer for answer in _shown_answers(connection, row.task)}
    if word.kind == "ranking":
        _check_ranks(word.ranks, by_id)
    if word.kind == "withdraw" and (row.version == 0 or _kind(connection, row) == "withdraw"):
        raise ProblemError("nothing-to-undo", "there is nothing to undo on this task")
    task = leases.lock_task(connection, row.task)
    there = leases.standing(connection, row.task)
    status, state = _status(row, task, there, word, now)
    seconds = min(MAX_SECONDS, (now - row.started_at) / 1000 if word.seconds is None else word.seconds)
    added = connection.execute(
        database.insert(submissions)
        .values(
            assignment=row.id,
            version=row.version + 1,
            key=stored_key,
            kind=word.kind,
            status=status,
            flags=json.dumps(sorted(set(word.flags))),
            note=word.note,
            seconds=round(max(0.0, seconds), 3),
            at=now,
        )
        .on_conflict_do_nothing()
        .returning(submissions.c.seq)
    ).scalar()
    if added is None:
        raise ProblemError("edited-elsewhere", "another version was recorded at the same moment; load the page again")
    if word.kind == "ranking":
        places = _dense(word.ranks)
        values = [{"submission": added, "answer": by_id[a].seq, "rank": place} for a, place in places.items()]
        connection.execute(insert(ranks), values)
    connection.execute(_FORGET_DRAFT, {"assignment": row.id})
    changed: dict[str, Any] = {"state": state, "version": row.version + 1}
    if word.kind == "withdraw":
        changed |= {"lease_until": now + leases.LEASE_MS, "started_at": now}
        _keep_as_draft(connection, row, now)
    connection.execute(update(assignments).where(assignments.c.id == row.id).values(changed))
    leases.update_task_state(connection, task, {**there, row.id: (state, 0)})
    return wire.Accepted(assignment=row.id, version=row.version + 1, status=status, replayed=False)


def save_draft(
    database: Database, connection: Connection, annotator: int, assignment: str, draft: wire.DraftSave, now: int
) -> wire.DraftSaved:
    """Store a draft, and renew the lease. A draft of an outdated version is not stored."""
    row = _assignment(connection, annotator, assignment, lock=True)
    if draft.version == row.version:
        known = {answer.id for answer in _shown_answers(connection, row.task)}
        _refuse_unknown(draft.ranks, known)
        values = {"ranks": json.dumps(draft.ranks), "note": draft.note, "at": now}
        connection.execute(
            database.insert(drafts)
            .values(assignment=row.id, **values)
            .on_conflict_do_update(index_elements=["assignment"], set_=values)
        )
    if row.state == "open":
        leases.renew(connection, row.id, row.task, now)
    kept = connection.execute(select(assignments.c.lease_until).where(assignments.c.id == row.id)).scalar_one()
    return wire.DraftSaved(lease_until=stamp(kept))


def newest_of(connection: Connection, annotator: int, limit: int = 1) -> list[tuple[str, int, str, int]]:
    """The person's latest valid judgements: assignment, version, status and time, newest first."""
    rows = connection.execute(
        select(assignments.c.id, submissions.c.version, submissions.c.status, submissions.c.at)
        .join_from(submissions, assignments)
        .where(assignments.c.annotator == annotator, submissions.c.version == assignments.c.version)
        .where(submissions.c.kind != "withdraw")
        .order_by(submissions.c.seq.desc())
        .limit(limit)
    )
    return [(row.id, row.version, row.status, row.at) for row in rows]


def _assignment(connection: Connection, annotator: int, identity: str, *, lock: bool = False) -> Row[Any]:
    named = {"identity": identity, "annotator": annotator}
    row = connection.execute(_LOCK_ASSIGNMENT if lock else _ASSIGNMENT, named).first()
    if row is None:
        raise ProblemError("not-found", f"you have no task {identity!r}; the next one is at /")
    return row


def _shown_answers(connection: Connection, task: int) -> list[Row[Any]]:
    return list(connection.execute(_SHOWN_ANSWERS, {"task": task}))


def _version(connection: Connection, row: Row[Any], version: int) -> Judgement:
    found = connection.execute(
        select(submissions).where(submissions.c.assignment == row.id, submissions.c.version == version)
    ).one()
    given = connection.execute(
        select(answers.c.id, ranks.c.rank).join_from(ranks, answers).where(ranks.c.submission == found.seq)
    )
    return Judgement(found.kind, dict(given.all()), tuple(json.loads(found.flags)), found.note, found.seconds)


def _kind(connection: Connection, row: Row[Any]) -> str:
    return _version(connection, row, row.version).kind


def _same(one: Judgement, other: Judgement) -> bool:
    return (
        one.kind == other.kind
        and _dense(one.ranks) == _dense(other.ranks)
        and set(one.flags) == set(other.flags)
        and one.note == other.note
    )


def _dense(given: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(given, wire.dense(list(given.values())), strict=True))


def _replay(
    connection: Connection, annotator: int, row: Row[Any], recorded: Row[Any], word: Judgement
) -> wire.Accepted:
    if not _same(_version(connection, row, recorded.version), word):
        shown = show(connection, annotator, row.id)
        raise ConflictError("key-reused", "this key was used for another judgement; nothing was recorded", shown, word)
    return wire.Accepted(assignment=row.id, version=recorded.version, status=recorded.status, replayed=True)


def _from_another_tab(
    connection: Connection, annotator: int, row: Row[Any], version: int, word: Judgement
) -> wire.Accepted:
    if row.version and version == row.version - 1 and _same(_version(connection, row, row.version), word):
        query = select(submissions.c.status).where(submissions.c.assignment == row.id)
        status = connection.execute(query.where(submissions.c.version == row.version)).scalar_one()
        return wire.Accepted(assignment=row.id, version=row.version, status=status, replayed=True)
    detail = f"you began from version {version} of this ranking, and {row.version} is the newest; nothing was recorded"
    raise ConflictError("edited-elsewhere", detail, show(connection, annotator, row.id), word)


def _check_ranks(given: Mapping[str, int], by_id: Mapping[str, Any]) -> None:
    _refuse_unknown(given, by_id)
    for answer, rank in given.items():
        if not 1 <= rank <= len(by_id):
            raise ProblemError(
                "rank-out-of-range",
                f"answer {answer!r} has rank {rank}; ranks go from 1 (best) to {len(by_id)}",
                answer=answer,
            )
    missing = [answer for answer in by_id if answer not in given]
    if missing:
        raise ProblemError(
            "incomplete-ranking",
            f"{len(missing)} of {len(by_id)} answers have no rank: {', '.join(missing)}",
            missing=missing,
        )


def _refuse_unknown(given: Mapping[str, int], known: Any) -> None:
    for answer in given:
        if answer not in known:
            raise ProblemError("unknown-answer", f"this task has no answer {answer!r}", answer=answer)


def _status(
    row: Row[Any], task: Row[Any], there: leases.Standing, word: Judgement, now: int
) -> tuple[wire.Status, str]:
    """The status of the submission, and the new state of the assignment."""
    if word.kind == "skip":
        return "skipped", "skipped"
    if word.kind == "flag":
        return "flagged", "flagged"
    if word.kind == "withdraw":
        return "withdrawn", "open"
    if task.closed_at is not None:
        return "late", row.state if row.state in ("counted", "surplus") else "late"
    # A valid lease guarantees that the ranking counts. After it has expired, it counts only if one is still needed.
    if leases.places_taken(there, now, without=row.id) < task.wanted:
        return "counted", "counted"
    return "surplus", "surplus"


def _keep_as_draft(connection: Connection, row: Row[Any], now: int) -> None:
    """After an undo, the page shows the withdrawn ranking, to be edited."""
    before = _version(connection, row, row.version)
    if before.kind == "ranking":
        values = {"ranks": json.dumps(dict(before.ranks)), "note": before.note, "at": now}
        connection.execute(insert(drafts).values(assignment=row.id, **values))
