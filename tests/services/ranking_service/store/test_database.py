"""Migrations, locks, and what a failure of the database means."""

import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import insert, inspect, select, text

from harness.machine.disks import fill, small_disk
from harness.machine.postgres import PostgresServer
from plaudit.ranking_service.store import files
from plaudit.ranking_service.store.backup import backup
from plaudit.ranking_service.store.database import Database, DatabaseSetupError, StoreUnavailableError
from plaudit.ranking_service.store.schema import audit, metadata

ROW = {"at": 1, "actor": None, "action": "test", "object": "x", "detail": "{}"}


def test_the_migrations_make_exactly_the_tables_of_the_schema(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrating_again_and_from_several_services_at_once_changes_nothing(database_url: str) -> None:
    found = [Database(database_url) for _ in range(3)]
    threads = [threading.Thread(target=database.migrate) for database in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found[0].migrate()
    with found[0].read() as connection:
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
    for database in found:
        database.close()


def test_there_is_one_line_of_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", "plaudit.ranking_service.store:migrations")
    config.set_main_option("path_separator", "os")
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_a_failure_inside_a_transaction_leaves_nothing(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            connection.execute(insert(audit).values(ROW))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.read() as connection:
        assert connection.execute(select(audit)).all() == []


def test_sqlite_writes_ahead_and_waits_for_the_disk(sqlite: Database) -> None:
    with sqlite.read() as connection:
        pragmas = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_a_database_that_stays_locked_is_unavailable_and_then_goes_on(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "locked.db"), lock_timeout_s=0.2)
    database.migrate()
    with closing(sqlite3.connect(tmp_path / "locked.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match="locked"), database.write():
            pass
        other.execute("ROLLBACK")
    with database.write() as connection:
        connection.execute(insert(audit).values(ROW))
    database.close()


def test_a_full_disk_is_unavailable_and_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2048) as disk:
        database = Database(str(disk / "full.db"))
        database.migrate()
        filler = fill(disk)
        with pytest.raises(StoreUnavailableError, match="full"):
            write_much(database)
        filler.unlink()
        with database.write() as connection:
            connection.execute(insert(audit).values(ROW))
        with database.read() as connection:
            assert len(connection.execute(select(audit)).all()) == 1
        database.close()


def write_much(database: Database) -> None:
    with database.write() as connection:
        for _ in range(2000):
            connection.execute(insert(audit).values(ROW | {"detail": "x" * 1000}))


def test_a_cursor_waits_for_writers_with_lower_numbers(postgres: PostgresServer) -> None:
    """Nothing may appear behind a cursor that was handed out: the lock of the first writer holds the reader back."""
    database = Database(postgres.url())
    database.migrate()
    found: list[int] = []
    with database.write() as connection:
        connection.execute(text("LOCK TABLE submissions IN ROW EXCLUSIVE MODE"))
        reader = threading.Thread(target=lambda: found.append(files.last_seq(database)))
        reader.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'ShareLock'")
        while not connection.execute(waiting).scalar():
            pass
        assert found == []
    reader.join()
    database.close()
    assert found == [0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/name", "only sqlite and postgresql are supported"),
        ("nonsense://x", "nonsense"),
        ("sqlite://", "names no file"),
        ("/nowhere/at/all.db", "there is no directory /nowhere/at"),
    ],
)
def test_a_database_that_cannot_be_used_is_said_in_one_line(url: str, said: str) -> None:
    with pytest.raises(DatabaseSetupError, match=said):
        Database(url)


def test_a_password_is_not_shown() -> None:
    assert "secret" not in str(Database("postgresql://me:secret@127.0.0.1:1/x"))


def test_a_backup_is_whole_and_replaces_nothing(sqlite: Database, tmp_path: Path) -> None:
    with sqlite.write() as connection:
        connection.execute(insert(audit).values(ROW))
    copy = tmp_path / "copy.db"
    backup(sqlite, copy)
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT count(*) FROM audit").fetchone() == (1,)
    with pytest.raises(DatabaseSetupError, match="exists already"):
        backup(sqlite, copy)
    assert not (tmp_path / ".copy.db.writing").exists()
    assert not (tmp_path / "copy.db-wal").exists()


def test_a_database_and_its_copy_are_its_owners_alone(sqlite: Database, tmp_path: Path) -> None:
    backup(sqlite, tmp_path / "copy.db")
    with sqlite.write() as connection:
        connection.execute(insert(audit).values(ROW))
        files_there = [path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o077]
    assert files_there == []


def test_a_database_of_a_later_version_is_left_alone(sqlite: Database) -> None:
    with sqlite.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseSetupError, match="made by another version"):
        sqlite.migrate()


def test_a_backup_of_postgres_is_a_dump_that_can_be_restored(postgres: PostgresServer, tmp_path: Path) -> None:
    database, other = Database(postgres.url()), Database(postgres.url())
    database.migrate()
    with database.write() as connection:
        connection.execute(insert(audit).values(ROW))
    backup(database, tmp_path / "rankings.dump")
    target = other.url.set(drivername="postgresql").render_as_string(hide_password=False)
    subprocess.run(["pg_restore", f"--dbname={target}", str(tmp_path / "rankings.dump")], check=True)
    with other.read() as connection:
        assert len(connection.execute(select(audit)).all()) == 1
    database.close()
    other.close()
