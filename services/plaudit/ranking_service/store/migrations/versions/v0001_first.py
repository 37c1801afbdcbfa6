"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "batches",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("overlap", sa.Integer, nullable=False),
        sa.Column("overlap_share", sa.Float(53), nullable=False),
        sa.Column("instructions", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("closed_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
        sa.CheckConstraint("purpose IN ('train', 'evaluation')", name="ck_batches_purpose"),
        sa.CheckConstraint("overlap >= 1", name="ck_batches_overlap"),
    )
    op.create_table(
        "tasks",
        sa.Column("seq", _number(), nullable=False),
        sa.Column("batch", sa.String(64), nullable=False),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("group", sa.String(128), nullable=False),
        sa.Column("split", sa.String(16), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("wanted", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_tasks"),
        sa.ForeignKeyConstraint(["batch"], ["batches.id"], name="fk_tasks_batch"),
        sa.UniqueConstraint("batch", "id", name="uq_tasks_batch_id"),
        sa.CheckConstraint("state IN ('open', 'done', 'parked', 'identical')", name="ck_tasks_state"),
    )
    op.create_index("ix_tasks_state_batch_position", "tasks", ["state", "batch", "position"])
    op.create_table(
        "answers",
        sa.Column("seq", _number(), nullable=False),
        sa.Column("task", _number(), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("revision", sa.Text, nullable=False),
        sa.Column("seed", sa.String(128)),
        sa.Column("same_as", sa.Integer),
        sa.PrimaryKeyConstraint("seq", name="pk_answers"),
        sa.ForeignKeyConstraint(["task"], ["tasks.seq"], name="fk_answers_task"),
        sa.UniqueConstraint("task", "position", name="uq_answers_task_position"),
        sa.UniqueConstraint("task", "id", name="uq_answers_task_id"),
    )
    op.create_table(
        "annotators",
        sa.Column("seq", _number(), nullable=False),
        sa.Column("pseudonym", sa.String(128), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("token_sha256", sa.String(64)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("disabled_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("seq", name="pk_annotators"),
        sa.UniqueConstraint("pseudonym", name="uq_annotators_pseudonym"),
        sa.UniqueConstraint("token_sha256", name="uq_annotators_token_sha256"),
        sa.CheckConstraint("role IN ('annotator', 'admin')", name="ck_annotators_role"),
    )
    op.create_table(
        "sessions",
        sa.Column("token_sha256", sa.String(64), nullable=False),
        sa.Column("annotator", _number(), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("token_sha256", name="pk_sessions"),
        sa.ForeignKeyConstraint(["annotator"], ["annotators.seq"], name="fk_sessions_annotator"),
    )
    op.create_index("ix_sessions_annotator", "sessions", ["annotator"])
    op.create_table(
        "assignments",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("task", _number(), nullable=False),
        sa.Column("annotator", _number(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("shown_order", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_assignments"),
        sa.ForeignKeyConstraint(["task"], ["tasks.seq"], name="fk_assignments_task"),
        sa.ForeignKeyConstraint(["annotator"], ["annotators.seq"], name="fk_assignments_annotator"),
        sa.UniqueConstraint("task", "annotator", name="uq_assignments_task_annotator"),
        sa.CheckConstraint(
            "state IN ('open', 'counted', 'surplus', 'late', 'skipped', 'flagged')", name="ck_assignments_state"
        ),
    )
    op.create_index("ix_assignments_annotator_state", "assignments", ["annotator", "state"])
    op.create_table(
        "submissions",
        sa.Column("seq", _number(), nullable=False),
        sa.Column("assignment", sa.String(32), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("flags", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_submissions"),
        sa.ForeignKeyConstraint(["assignment"], ["assignments.id"], name="fk_submissions_assignment"),
        sa.UniqueConstraint("key", name="uq_submissions_key"),
        sa.UniqueConstraint("assignment", "version", name="uq_submissions_assignment_version"),
        sa.CheckConstraint("version >= 1", name="ck_submissions_version"),
        sa.CheckConstraint("kind IN ('ranking', 'skip', 'flag', 'withdraw')", name="ck_submissions_kind"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "ranks",
        sa.Column("submission", _number(), nullable=False),
        sa.Column("answer", _number(), nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("submission", "answer", name="pk_ranks"),
        sa.ForeignKeyConstraint(["submission"], ["submissions.seq"], name="fk_ranks_submission"),
        sa.ForeignKeyConstraint(["answer"], ["answers.seq"], name="fk_ranks_answer"),
        sa.CheckConstraint("rank >= 1", name="ck_ranks_rank"),
    )
    op.create_table(
        "drafts",
        sa.Column("assignment", sa.String(32), nullable=False),
        sa.Column("ranks", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("assignment", name="pk_drafts"),
        sa.ForeignKeyConstraint(["assignment"], ["assignments.id"], name="fk_drafts_assignment"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", _number(), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", _number()),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("object", sa.String(128), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
        sa.ForeignKeyConstraint(["actor"], ["annotators.seq"], name="fk_audit_actor"),
    )


def downgrade() -> None:
    """Drop every table, and with them every ranking: take a backup first."""
    for table in ("audit", "drafts", "ranks", "submissions", "assignments", "sessions", "annotators", "answers"):
        op.drop_table(table)
    op.drop_table("tasks")
    op.drop_table("batches")
