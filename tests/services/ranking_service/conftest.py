from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from harness.absent import absent
from harness.machine.postgres import PostgresServer, programs
from harness.ranking_service import KEY, ClientOf, Fill, Invite, RankingService, rows, upload
from plaudit.ranking_service.store import batches, people
from plaudit.ranking_service.store.database import Database, now_ms
from plaudit.ranking_service.web.app import Options, create_app
from plaudit.wire import rankings as wire

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; its absence skips a test here and fails it in continuous integration."""
    if programs() is None:
        absent("PostgreSQL is not installed: apt-get install postgresql")
    server = PostgresServer()
    yield server
    server.remove()


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "rankings.db")
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A new SQLite database, for what is the same on both."""
    made = Database(str(tmp_path / "rankings.db"))
    made.migrate()
    yield made
    made.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RankingService]:
    """The real program over SQLite."""
    running = RankingService(str(tmp_path / "service.db"))
    yield running
    running.kill()


@pytest.fixture
def fill(database: Database) -> Fill:
    """Uploads tasks to `database`."""

    def put(n: int = 1, **settings: object) -> wire.BatchUploaded:
        listed = rows(n, batch=str(settings.get("id", "b1")))
        with database.write() as connection:
            return batches.upload(database, connection, upload(listed, **settings), now_ms())

    return put


@pytest.fixture
def someone(database: Database) -> Invite:
    """Invites a person into `database`; their number."""

    def make(role: wire.Role = "annotator") -> int:
        with database.write() as connection:
            _, token = people.invite(connection, wire.Invite(role=role), now_ms())
            person = people.by_token(connection, token)
            assert person is not None
            return person.seq

    return make


@pytest.fixture
def client_of() -> ClientOf:
    """An HTTP client of the application over a database, without a process."""

    def make(database: Database, **options: object) -> httpx.AsyncClient:
        settings = {"api_keys": [KEY], "requests_per_minute": 0, "requests_per_minute_address": 0} | options
        app = create_app(database, Options(**settings))  # type: ignore[arg-type]
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://rank.example")

    return make
