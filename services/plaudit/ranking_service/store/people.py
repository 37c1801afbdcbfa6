"""Annotators: invitations, sessions, deletion. Tokens are 256 random bits; the database stores only their hashes.

Names stay in the database; exports carry pseudonyms.
"""

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.store.schema import annotators, assignments, audit, drafts, sessions, submissions
from plaudit.wire import rankings as wire

TOKEN_BYTES = 32
PSEUDONYM_LETTERS = "23456789abcdefghjkmnpqrstuvwxyz"
"""No characters that are easily confused."""

_PERSON = select(annotators.c.seq, annotators.c.pseudonym, annotators.c.role).where(annotators.c.disabled_at.is_(None))
_BY_TOKEN = _PERSON.where(annotators.c.token_sha256 == bindparam("hash"))
_BY_SESSION = _PERSON.join(sessions, sessions.c.annotator == annotators.c.seq).where(
    sessions.c.token_sha256 == bindparam("hash"), sessions.c.expires_at > bindparam("now")
)


@dataclass(frozen=True)
class Person:
    """A person with a valid token or session."""

    seq: int
    pseudonym: str
    role: wire.Role


def hash_of(token: str) -> str:
    """The stored hash of a token. The token is random enough that a plain hash can't be reversed."""
    return hashlib.sha256(token.encode()).hexdigest()


def note_in_audit(
    connection: Connection, action: str, subject: str, now: int, *, actor: int | None = None, **detail: Any
) -> None:
    """Add an entry to the audit log. `detail` holds counts and states, never texts or names."""
    row = {"at": now, "actor": actor, "action": action, "object": subject, "detail": json.dumps(detail)}
    connection.execute(insert(audit).values(row))


def invite(connection: Connection, wanted: wire.Invite, now: int, *, actor: int | None = None) -> tuple[str, str]:
    """Add a person; pseudonym and token. The token can't be read again."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    pseudonym = new_pseudonym()
    values = {"pseudonym": pseudonym, "name": wanted.name, "role": wanted.role, "created_at": now}
    connection.execute(insert(annotators).values(token_sha256=hash_of(token), **values))
    note_in_audit(connection, "invite", pseudonym, now, actor=actor, role=wanted.role)
    return pseudonym, token


def new_link(connection: Connection, pseudonym: str, now: int, *, actor: int | None = None) -> str:
    """A new token for an existing person; the old token and all sessions become invalid."""
    seq = _seq_of(connection, pseudonym)
    token = secrets.token_urlsafe(TOKEN_BYTES)
    connection.execute(
        update(annotators).where(annotators.c.seq == seq).values(token_sha256=hash_of(token), disabled_at=None)
    )
    connection.execute(delete(sessions).where(sessions.c.annotator == seq))
    note_in_audit(connection, "new-link", pseudonym, now, actor=actor)
    return token


def delete_person(connection: Connection, pseudonym: str, now: int, *, actor: int | None = None) -> None:
    """Delete a person. The rankings stay, under a new pseudonym that can't be linked to the old one.

    Name, token, sessions, drafts and free-text notes are deleted, and leases are released.
    """
    seq = _seq_of(connection, pseudonym)
    theirs = select(assignments.c.id).where(assignments.c.annotator == seq)
    connection.execute(delete(sessions).where(sessions.c.annotator == seq))
    connection.execute(delete(drafts).where(drafts.c.assignment.in_(theirs)))
    connection.execute(update(submissions).where(submissions.c.assignment.in_(theirs)).values(note=""))
    held = (assignments.c.annotator == seq) & (assignments.c.state == "open")
    connection.execute(update(assignments).where(held).values(lease_until=0))
    fresh = new_pseudonym()
    gone = {"pseudonym": fresh, "name": "", "token_sha256": None, "disabled_at": now}
    connection.execute(update(annotators).where(annotators.c.seq == seq).values(gone))
    connection.execute(update(audit).where(audit.c.object == pseudonym).values(object="deleted"))
    note_in_audit(connection, "delete-person", "deleted", now, actor=actor)


def by_token(connection: Connection, token: str) -> Person | None:
    """The owner of an invitation; None if it is not valid."""
    found = connection.execute(_BY_TOKEN, {"hash": hash_of(token)}).first()
    return None if found is None else Person(*found)


def begin_session(connection: Connection, person: Person, now: int, lasts_ms: int) -> str:
    """Begin a session of this person, and remove expired sessions."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    connection.execute(delete(sessions).where(sessions.c.expires_at <= now))
    values = {"annotator": person.seq, "created_at": now, "expires_at": now + lasts_ms}
    connection.execute(insert(sessions).values(token_sha256=hash_of(token), **values))
    return token


def by_session(connection: Connection, token: str, now: int) -> Person | None:
    """The owner of a session; None if it is unknown or expired."""
    found = connection.execute(_BY_SESSION, {"hash": hash_of(token), "now": now}).first()
    return None if found is None else Person(*found)


def end_session(connection: Connection, token: str) -> None:
    """End a session."""
    connection.execute(delete(sessions).where(sessions.c.token_sha256 == hash_of(token)))


def everybody(connection: Connection) -> list[wire.AnnotatorInfo]:
    """All people, in the order of invitation."""
    counted = (
        select(assignments.c.annotator, func.count().label("n"))
        .where(assignments.c.state.in_(("counted", "surplus", "late")))
        .group_by(assignments.c.annotator)
        .subquery()
    )
    rows = connection.execute(
        select(annotators, counted.c.n)
        .outerjoin(counted, counted.c.annotator == annotators.c.seq)
        .order_by(annotators.c.seq)
    )
    return [
        wire.AnnotatorInfo(
            annotator=row.pseudonym,
            name=row.name,
            role=row.role,
            disabled=row.disabled_at is not None,
            rankings=row.n or 0,
        )
        for row in rows
    ]


def new_pseudonym() -> str:
    """A random name."""
    return "p-" + "".join(secrets.choice(PSEUDONYM_LETTERS) for _ in range(10))


def _seq_of(connection: Connection, pseudonym: str) -> int:
    seq = connection.execute(select(annotators.c.seq).where(annotators.c.pseudonym == pseudonym)).scalar()
    if seq is None:
        raise ProblemError("not-found", f"there is no annotator {pseudonym!r}")
    return int(seq)
