"""Back up the database while it is in use. The copy appears under its name only when it is complete."""

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from plaudit import atomic
from plaudit.ranking_service.store.database import Database, DatabaseSetupError


def backup(database: Database, to: Path) -> None:
    """Copy a SQLite file with SQLite's backup API, or PostgreSQL with pg_dump. Raises `DatabaseSetupError`."""
    if to.exists():
        raise DatabaseSetupError(f"{to} exists already; name another file")
    with atomic.new_file(to, mode=0o600) as part:
        if database.is_postgres:
            _dump(database, part)
        else:
            _copy(database, part)


def _copy(database: Database, part: Path) -> None:
    path = database.sqlite_path
    if path is None or not path.is_file():
        raise DatabaseSetupError(f"--database {database}: there is no such file to copy")
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(part)) as target:
            source.backup(target)
            # One file, without a journal beside it.
            target.execute("PRAGMA journal_mode=DELETE")
            (verdict,) = target.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        raise DatabaseSetupError(f"{part} can't be written: {error}") from None
    if verdict != "ok":
        raise DatabaseSetupError(f"--database {database} is damaged: {verdict}")


def _dump(database: Database, part: Path) -> None:
    if shutil.which("pg_dump") is None:
        raise DatabaseSetupError("pg_dump is not installed; install PostgreSQL's client programs")
    url = database.url
    # The password goes into the environment: a process list shows arguments.
    environment = os.environ | ({"PGPASSWORD": str(url.password)} if url.password else {})
    plain = url.set(drivername="postgresql", password=None).render_as_string(hide_password=False)
    command = ["pg_dump", "--format=custom", f"--file={part}", f"--dbname={plain}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise DatabaseSetupError(f"pg_dump failed: {done.stderr.strip()}")
