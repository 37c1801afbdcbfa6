"""`plaudit-rank`: serve the page, invite people, export and import rankings, copy the database.

An unusable setting is one line on stderr and exit code 2; a refused file is exit code 65.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings
from sqlalchemy import select

from plaudit import atomic
from plaudit.ranking_service import exchange
from plaudit.ranking_service.problems import ProblemError
from plaudit.ranking_service.settings import Backup, Export, Import, InviteCommand, Secrets, Serve
from plaudit.ranking_service.store import batches, files, people
from plaudit.ranking_service.store.backup import backup
from plaudit.ranking_service.store.database import Database, DatabaseSetupError, StoreUnavailableError, now_ms
from plaudit.ranking_service.store.schema import batches as batches_table
from plaudit.serving.listening import StartError, bound_socket, log_event, url_of, write_ready_file
from plaudit.wire import rankings as wire

PROGRAM = "plaudit-rank"
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_UNAVAILABLE = 75
S = TypeVar("S", bound=BaseSettings)


class DataError(Exception):
    """A file was refused. The message is one line and names the row and the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else EXIT_USAGE
    run = COMMANDS.get(words[0])
    try:
        if run is None:
            raise StartError(f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
        return run(words[1:])
    except (StartError, DatabaseSetupError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (DataError, ProblemError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_DATA
    except StoreUnavailableError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE


def parse(kind: type[S], command: str, arguments: list[str]) -> S:
    """Flags, else RANK_* variables, else defaults. Raises `StartError`; `SystemExit` for --help and unknown flags."""
    try:
        return kind(_cli_parse_args=arguments, _cli_prog_name=f"{PROGRAM} {command}")
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "arguments"
        flag = "--" + name.replace("_", "-")
        raise StartError(f"{flag} {first['input']}: {first['msg']}") from None


def api_keys(settings: Serve) -> list[str]:
    """The accepted bearer keys: RANK_API_KEY and the lines of --api-key-file."""
    secret = Secrets().api_key
    keys = [secret.get_secret_value()] if secret is not None else []
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"--api-key-file {settings.api_key_file} can't be read: {error}") from None
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise StartError(f"--api-key-file {settings.api_key_file} holds no key; write one on each line")
    if any(not key.strip() for key in keys):
        raise StartError("RANK_API_KEY is empty; set a key or unset it")
    return keys


def serve(arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    # Until there is something to drain, SIGTERM ends the process. Without a handler, process 1 would ignore it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    settings = parse(Serve, "serve", arguments)
    keys = api_keys(settings)
    with bound_socket(settings.host, settings.port) as listener, _opened(settings.database) as database:
        from plaudit.ranking_service.web.app import Options, create_app
        from plaudit.ranking_service.web.server import Server

        options = Options(
            api_keys=keys,
            public_url=settings.public_url,
            secure_cookies=settings.secure_cookies,
            session_hours=settings.session_hours,
            requests_per_minute=settings.requests_per_minute,
            requests_per_minute_address=settings.requests_per_minute_address,
            max_body_bytes=settings.max_body_bytes,
        )
        url = url_of(settings.host, listener.getsockname()[1])

        def ready() -> None:
            if settings.ready_file is not None:
                write_ready_file(settings.ready_file, url)
            log_event("ready", url=url, pid=os.getpid(), database=str(database))

        app = create_app(database, options)
        Server(app, settings.grace_s, settings.trusted_proxies, ready).run(sockets=[listener])
        log_event("stopped")
    return 0


def invite(arguments: list[str]) -> int:
    """Print a link for each person."""
    settings = parse(InviteCommand, "invite", arguments)
    base = settings.public_url.rstrip("/")
    with _opened(settings.database) as database, database.write() as connection:
        if settings.again is not None:
            token = people.new_link(connection, settings.again, now_ms())
            made = [(settings.again, "", token)]
        else:
            names = [*settings.names, *[""] * settings.number] or [""]
            made = [
                (pseudonym, name, token)
                for name in names
                for pseudonym, token in [
                    people.invite(connection, wire.Invite(name=name, role=settings.role), now_ms())
                ]
            ]
    for pseudonym, name, token in made:
        print("\t".join([pseudonym, f"{base}{wire.INVITATION_PATH}/{token}", *([name] if name else [])]))
    return 0


def export_rankings(arguments: list[str]) -> int:
    """Write rankings as JSON lines."""
    settings = parse(Export, "export", arguments)
    dropped = exchange.Dropped()
    with _opened(settings.database) as database, database.read() as connection:
        chosen = None if settings.batch is None else [settings.batch]
        if (
            chosen
            and connection.execute(select(batches_table.c.id).where(batches_table.c.id.in_(chosen))).first() is None
        ):
            raise StartError(f"--batch {settings.batch}: there is no such batch")
        rows: Iterable[Any] = files.export(connection, chosen, late=settings.late, history=settings.history)
        if settings.format != "plaudit":
            rows = exchange.pairs_of(rows, settings.format, dropped)
        written = _write_lines(settings.to, exchange.lines(rows))
    said = f"{written} lines"
    if settings.format != "plaudit":
        said += (
            f"; {settings.format} has no ties and no skips: {dropped.ties} ties dropped, {dropped.rows} skips and flags"
        )
    print(f"{PROGRAM}: {said}", file=sys.stderr)
    return 0


def import_file(arguments: list[str]) -> int:
    """Read answers or rankings from JSON lines."""
    settings = parse(Import, "import", arguments)
    objects = _read_lines(settings.source)
    first = objects[0] if objects else {}
    with _opened(settings.database) as database:
        if settings.format == "plaudit" and isinstance(first, dict) and "id" in first and "ranks" not in first:
            return _import_answers(database, settings, objects)
        if settings.format == "plaudit" and isinstance(first, dict) and "ranks" in first:
            rows = [_row(wire.RankingRow, number, item) for number, item in enumerate(objects, start=1)]
        else:
            form = "ranked" if settings.format == "plaudit" else settings.format
            batch = settings.batch or settings.source.stem
            try:
                rows = exchange.rows_of(objects, form, batch)
            except ValueError as error:
                raise DataError(f"{settings.source}: {error}; nothing was taken") from None
        with database.write() as connection:
            added = files.import_rows(database, connection, rows, now_ms(), only=settings.batch)
    print(f"{PROGRAM}: {added} rankings added, {len(rows) - added} were there", file=sys.stderr)
    return 0


def copy_database(arguments: list[str]) -> int:
    """Copy the database while the service runs."""
    settings = parse(Backup, "backup", arguments)
    if "://" not in settings.database and not Path(settings.database).is_file():
        raise StartError(f"--database {settings.database}: there is no such file to copy")
    database = Database(settings.database)
    try:
        backup(database, settings.to)
    except OSError as error:
        raise StartError(f"{settings.to} can't be written: {error.strerror}") from None
    finally:
        database.close()
    print(f"{PROGRAM}: {settings.to}, {settings.to.stat().st_size} bytes", file=sys.stderr)
    return 0


COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "serve": serve,
    "invite": invite,
    "export": export_rankings,
    "import": import_file,
    "backup": copy_database,
}


def _usage() -> str:
    lines = [f"{PROGRAM}: a service where people rank answers.", "", f"  {PROGRAM} COMMAND --help", ""]
    lines += [f"  {name:<8} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(lines)


def _import_answers(database: Database, settings: Import, objects: list[Any]) -> int:
    rows = [_row(wire.AnswersRow, number, item) for number, item in enumerate(objects, start=1)]
    done = []
    with database.write() as connection:
        for batch in [settings.batch] if settings.batch else dict.fromkeys(row.batch for row in rows):
            chosen = rows if settings.batch else [row for row in rows if row.batch == batch]
            upload = wire.BatchUpload.model_construct(
                id=batch,
                round=settings.round,
                purpose=settings.purpose,
                overlap=settings.overlap,
                overlap_share=settings.overlap_share,
                instructions="",
                rows=chosen,
            )
            done.append(batches.upload(database, connection, upload, now_ms()))
    for told in done:
        print(f"{PROGRAM}: batch {told.id}: {told.added} tasks added, {told.known} were there", file=sys.stderr)
    return 0


M = TypeVar("M", wire.RankingRow, wire.AnswersRow)


def _row(kind: type[M], number: int, item: Any) -> M:
    try:
        return kind.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"row {number}: {where + ': ' if where else ''}{message}; nothing was taken") from None


def _read_lines(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path} can't be read: {error}") from None
    objects = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); nothing was taken") from None
    return objects


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    if str(path) == "-":
        return sum(1 for line in lines if sys.stdout.write(line) or True)
    written = 0
    try:
        with atomic.new_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
            for line in lines:
                file.write(line)
                written += 1
    except OSError as error:
        raise StartError(f"{path} can't be written: {error.strerror}") from None
    return written


@contextlib.contextmanager
def _opened(url: str) -> Generator[Database, None, None]:
    """The database, migrated to this version's tables."""
    database = Database(url)
    try:
        database.migrate()
        yield database
    finally:
        database.close()


if __name__ == "__main__":
    sys.exit(main())
