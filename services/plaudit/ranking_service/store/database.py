"""Transactions on SQLite or PostgreSQL: when they begin, what they lock, and what their failures mean.

On SQLite, a writing transaction takes the write lock when it begins (BEGIN IMMEDIATE). A transaction that reads first
and writes later would fail in the middle, however long its lock timeout.
"""

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Table, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry, QueuePool

LOCK_TIMEOUT_S = 10.0
"""How long a request waits for a lock before it gets 503."""
CONNECTIONS = 8
CONNECT_TIMEOUT_S = 5
MIGRATION_LOCK = 0x706C6175
"""The advisory lock that one of several services holds while it migrates a PostgreSQL database."""
WRITE = "plaudit_write"
PASSING = ("locked", "busy", "full", "disk i/o", "unable to open", "readonly", "not a database")
"""Words in SQLite's messages whose cause is outside the program, so that a retry may succeed."""


class StoreUnavailableError(Exception):
    """The database can't be used now: locked, full or unreachable. Nothing was stored; a retry may succeed."""


class DatabaseSetupError(Exception):
    """The database setting is unusable. The message is one line and says what to do."""


def now_ms() -> int:
    """The time in the database's unit: milliseconds since 1970 in UTC."""
    return time.time_ns() // 1_000_000


class Database:
    """Transactions on one database. `read` and `write` are context managers that give a connection.

    Both raise `StoreUnavailableError` when the database is locked for too long, full or unreachable.
    """

    def __init__(self, url: str, *, connections: int = CONNECTIONS, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self._lock_timeout_s = lock_timeout_s
        try:
            self.url = make_url(url if "://" in url else f"sqlite:///{url}")
            if self.url.drivername in ("postgresql", "postgres"):
                self.url = self.url.set(drivername="postgresql+psycopg")
            self.is_postgres = self.url.get_backend_name() == "postgresql"
            if not self.is_postgres and self.url.get_backend_name() != "sqlite":
                raise DatabaseSetupError(f"--database {url}: only sqlite and postgresql are supported")
            options: dict[str, Any] = {"pool_timeout": lock_timeout_s, "pool_size": connections, "max_overflow": 0}
            if self.is_postgres:
                milliseconds = int(lock_timeout_s * 1000)
                options["pool_pre_ping"] = True
                options["connect_args"] = {
                    "connect_timeout": CONNECT_TIMEOUT_S,
                    "options": f"-c lock_timeout={milliseconds} -c idle_in_transaction_session_timeout=60000",
                }
            else:
                options["poolclass"] = QueuePool
                options["connect_args"] = {"timeout": lock_timeout_s, "check_same_thread": False}
            self.engine = create_engine(self.url, **options)
        except NoSuchModuleError as error:
            raise DatabaseSetupError(f"--database {url}: {error}") from None
        except ModuleNotFoundError as error:
            needed = f"{error.name} is not installed; pip install 'plaudit[rank-postgres]'"
            raise DatabaseSetupError(f"--database {self.url.render_as_string()}: {needed}") from None
        # One writer at a time: waiting for SQLite's own lock is polling, and can starve a writer.
        self._writing = threading.Lock()
        self._sqlite_writer = self.engine.execution_options(**{WRITE: True})
        if not self.is_postgres:
            _make_private(self.url.database)
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @property
    def sqlite_path(self) -> Path | None:
        """The database's file; None on PostgreSQL."""
        return None if self.is_postgres else Path(self.url.database or "")

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextlib.contextmanager
    def read(self) -> Generator[Connection, None, None]:
        """A read-only transaction."""
        with _failures_named(), self.engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Generator[Connection, None, None]:
        """A transaction that is committed at the end of the block, and rolled back on an exception."""
        if self.is_postgres:
            with _failures_named(), self.engine.begin() as connection:
                yield connection
            return
        if not self._writing.acquire(timeout=self._lock_timeout_s):
            raise StoreUnavailableError(f"the database was locked for more than {self._lock_timeout_s:g} s")
        try:
            with _failures_named(), self._sqlite_writer.begin() as connection:
                yield connection
        finally:
            self._writing.release()

    def insert(self, table: Table) -> "postgresql.Insert | sqlite.Insert":
        """An INSERT with ON CONFLICT, in the database's own dialect."""
        return postgresql.insert(table) if self.is_postgres else sqlite.insert(table)

    def ping(self) -> None:
        """Raises `StoreUnavailableError` unless the database answers."""
        with self.read() as connection:
            connection.execute(text("SELECT 1"))

    def migrate(self, revision: str = "head") -> None:
        """Migrate the tables to this version of the program. Several services may do so at once."""
        config = Config()
        config.set_main_option("script_location", "plaudit.ranking_service.store:migrations")
        config.set_main_option("path_separator", "os")
        with self.write() as connection:
            if self.is_postgres:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, revision)
            except CommandError as error:
                reason = f"it was made by another version of this program ({error})"
                raise DatabaseSetupError(f"--database {self}: {reason}") from None

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


@contextlib.contextmanager
def _failures_named() -> Generator[None, None, None]:
    try:
        yield
    except PoolTimeoutError:
        raise StoreUnavailableError("all database connections were taken for too long") from None
    except (OperationalError, InterfaceError) as error:
        if not _passes(error):
            raise
        raise StoreUnavailableError(f"the database can't be used now: {_first_line(error)}") from error
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise StoreUnavailableError(f"the connection to the database was lost: {_first_line(error)}") from error


def _passes(error: DBAPIError) -> bool:
    if not isinstance(error.orig, sqlite3.Error):
        return True
    said = str(error.orig).lower()
    return any(reason in said for reason in PASSING)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0]


def _make_private(database: str | None) -> None:
    """Create a missing file readable by its owner only, because it holds names. SQLite's journals copy its mode."""
    if not database or database == ":memory:":
        raise DatabaseSetupError("--database names no file; several connections share one database")
    path = Path(database)
    if not path.parent.is_dir():
        raise DatabaseSetupError(f"--database {database}: there is no directory {path.parent}")
    with contextlib.suppress(OSError):  # opening the database reports the error
        private_file(path)


def private_file(path: Path) -> None:
    """Create an empty file that only its owner can read, unless a file of this name exists."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _prepare_sqlite(connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
    # The driver begins no transaction: `_begin_sqlite` does.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    immediate = connection.get_execution_options().get(WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
