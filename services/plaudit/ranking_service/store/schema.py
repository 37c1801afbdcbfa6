"""The tables. Submissions are only added: older versions stay, and the newest version counts.

Times are milliseconds since 1970 in UTC.

Failure modes: a constraint that only one of the two databases enforces.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

ESCAPE = "\x01"


class AnyText(TypeDecorator[str]):
    """Text that may hold NUL, which PostgreSQL refuses: NUL is stored as \\x01 0, and \\x01 as \\x01 1."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Escape, on the way into the database."""
        if value is None:
            return None
        return str(value).replace(ESCAPE, ESCAPE + "1").replace("\x00", ESCAPE + "0")

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Unescape, on the way out."""
        if value is None or ESCAPE not in value:
            return value
        return str(value).replace(ESCAPE + "0", "\x00").replace(ESCAPE + "1", ESCAPE)


def _number() -> Any:
    # SQLite generates numbers only for a column of exactly this type.
    return BigInteger().with_variant(Integer(), "sqlite")


batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("overlap", Integer, nullable=False),
    Column("overlap_share", Float(53), nullable=False),
    Column("instructions", AnyText, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("closed_at", BigInteger),
    CheckConstraint("purpose IN ('train', 'evaluation')", name="purpose"),
    CheckConstraint("overlap >= 1", name="overlap"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("seq", _number(), primary_key=True),
    Column("batch", ForeignKey("batches.id"), nullable=False),
    Column("id", String(128), nullable=False),
    Column("group", String(128), nullable=False),
    Column("split", String(16), nullable=False),
    Column("prompt", Text, nullable=False),  # JSON: a string or a list of turns
    Column("position", Integer, nullable=False),
    Column("wanted", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    UniqueConstraint("batch", "id"),
    CheckConstraint("state IN ('open', 'done', 'parked', 'identical')", name="state"),
    Index(None, "state", "batch", "position"),
)

answers = Table(
    "answers",
    metadata,
    Column("seq", _number(), primary_key=True),
    Column("task", ForeignKey("tasks.seq"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("id", String(128), nullable=False),
    Column("text", AnyText, nullable=False),
    Column("policy", AnyText, nullable=False),
    Column("revision", AnyText, nullable=False),
    Column("seed", String(128)),  # as text, since a seed may be larger than the database's numbers
    Column("same_as", Integer),  # position of an earlier answer with the same text
    UniqueConstraint("task", "position"),
    UniqueConstraint("task", "id"),
)

annotators = Table(
    "annotators",
    metadata,
    Column("seq", _number(), primary_key=True),
    Column("pseudonym", String(128), nullable=False, unique=True),
    Column("name", AnyText, nullable=False),
    Column("token_sha256", String(64), unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("disabled_at", BigInteger),
    CheckConstraint("role IN ('annotator', 'admin')", name="role"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_sha256", String(64), primary_key=True),
    Column("annotator", ForeignKey("annotators.seq"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)

assignments = Table(
    "assignments",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("task", ForeignKey("tasks.seq"), nullable=False),
    Column("annotator", ForeignKey("annotators.seq"), nullable=False),
    Column("state", String(16), nullable=False),
    Column("version", Integer, nullable=False),  # of the newest submission; 0 before the first
    Column("lease_until", BigInteger, nullable=False),
    Column("shown_order", Text, nullable=False),  # JSON: positions of answers
    Column("started_at", BigInteger, nullable=False),
    UniqueConstraint("task", "annotator"),
    CheckConstraint("state IN ('open', 'counted', 'surplus', 'late', 'skipped', 'flagged')", name="state"),
    Index(None, "annotator", "state"),
)

submissions = Table(
    "submissions",
    metadata,
    Column("seq", _number(), primary_key=True),
    Column("assignment", ForeignKey("assignments.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("key", String(128), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("flags", Text, nullable=False),  # JSON: a list of reasons
    Column("note", AnyText, nullable=False),
    Column("seconds", Float(53), nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("assignment", "version"),
    CheckConstraint("version >= 1", name="version"),
    CheckConstraint("kind IN ('ranking', 'skip', 'flag', 'withdraw')", name="kind"),
    sqlite_autoincrement=True,
)

ranks = Table(
    "ranks",
    metadata,
    Column("submission", ForeignKey("submissions.seq"), primary_key=True),
    Column("answer", ForeignKey("answers.seq"), primary_key=True),
    Column("rank", Integer, nullable=False),
    CheckConstraint("rank >= 1", name="rank"),
)

drafts = Table(
    "drafts",
    metadata,
    Column("assignment", ForeignKey("assignments.id"), primary_key=True),
    Column("ranks", Text, nullable=False),  # JSON: answer id to rank
    Column("note", AnyText, nullable=False),
    Column("at", BigInteger, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", _number(), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", ForeignKey("annotators.seq")),  # nobody: a key, or the command line
    Column("action", String(32), nullable=False),
    Column("object", String(128), nullable=False),
    Column("detail", Text, nullable=False),  # JSON, without texts and names
)
