"""Settings. Every field is a flag of its command and a `RANK_*` environment variable."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, CliPositionalArg, SettingsConfigDict

from plaudit.wire import rankings as wire

FileFormat = Literal["plaudit", "trl", "hh", "summarize"]


class _Command(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="RANK_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        use_attribute_docstrings=True,
        extra="forbid",
        frozen=True,
    )

    database: str = "rankings.db"
    """A file for SQLite, or a URL: postgresql://user@host/name. Put a URL with a password in RANK_DATABASE."""


class Serve(_Command):
    # The first line is indented like the others, so that --help shows all of them at its margin.
    """
    Serve the page where people rank answers, and the administrators' routes.

    Every flag is also a variable: --public-url is RANK_PUBLIC_URL. SIGTERM answers the accepted requests and ends.
    Without RANK_API_KEY or --api-key-file, only administrators who sign in by link can use the administrators' routes.
    See docs/how-to/ranking.md.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every interface."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8100
    """0 picks a free port; --ready-file says which."""
    public_url: str | None = None
    """The public address of the service, with which invitation links begin: https://rank.example."""
    api_key_file: Path | None = None
    """File with the accepted bearer keys, one on each line. RANK_API_KEY in the environment holds a single key."""
    secure_cookies: bool = True
    """Browsers send the session cookie over https only, or to localhost. Turn it off for http in a trusted network."""
    session_hours: Annotated[float, Field(gt=0, le=24 * 90)] = 24.0
    """How long a person stays signed in after opening the link."""
    requests_per_minute: Annotated[int, Field(ge=0)] = 600
    """Requests that one person may send in a minute; further ones get 429. 0 means no limit."""
    requests_per_minute_address: Annotated[int, Field(ge=0)] = 3000
    """The same for one address, which many people may share."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    """Bytes that an upload of answers may hold. Forms are limited to 256 KiB."""
    trusted_proxies: str = ""
    """Addresses or networks, comma separated, whose X-Forwarded-For and X-Forwarded-Proto are trusted."""
    ready_file: Path | None = None
    """File to write {"url", "pid"} to, as JSON, once the service is ready."""
    grace_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds that SIGTERM leaves for requests under way."""


class InviteCommand(_Command):
    """
    Invite people to rank, and print a link for each. A link is shown once; the database keeps a hash of it.
    """

    names: CliPositionalArg[list[str]] = []
    """Their names, which stay in the database."""
    number: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Invite this many people without a name."""
    role: wire.Role = "annotator"
    """An admin also sees progress, agreement and each person's counts, and closes batches."""
    again: str | None = None
    """A new link for this pseudonym; the old link and its sessions end."""
    public_url: str = "http://127.0.0.1:8100"
    """The public address of the service, with which the links begin."""


class Export(_Command):
    """
    Write rankings as JSON lines. A format that has no ties says how many it dropped.
    """

    to: CliPositionalArg[Path]
    """The file to write; - is standard output."""
    format: FileFormat = "plaudit"
    """plaudit keeps everything; trl, hh and summarize hold pairs of a better and a worse answer."""
    batch: str | None = None
    """Only this batch."""
    late: bool = False
    """Include rankings that came after a batch was closed."""
    history: bool = False
    """Include versions that were replaced later."""


class Import(_Command):
    """
    Read answers or rankings from JSON lines. A file with a wrong row is refused whole, with the row's number.
    """

    source: CliPositionalArg[Path]
    """The file to read."""
    format: FileFormat = "plaudit"
    """plaudit: rows of answers, of rankings, or of {"prompt", "answers"} with the best first."""
    batch: str | None = None
    """Rows must belong to this batch; with rows that name none, the batch they are put into."""
    overlap: Annotated[int, Field(ge=1, le=100)] = 3
    """For rows of answers: how many people rank a task that agreement is measured on."""
    overlap_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """For rows of answers: the share of such tasks; one person ranks each of the others."""
    purpose: wire.Purpose = "train"
    """For rows of answers: whether a model learns from the rankings, or policies are compared by them."""
    round: wire.Round = 0
    """For rows of answers: which round of training asks."""


class Backup(_Command):
    """
    Copy the database while the service runs: a SQLite file, or a dump of PostgreSQL by pg_dump.
    """

    to: CliPositionalArg[Path]
    """The file to write. It appears when it is complete."""


class Secrets(BaseSettings):
    """Secrets: they have no flag, because a process list shows flags."""

    model_config = SettingsConfigDict(env_prefix="RANK_", extra="ignore", frozen=True)

    api_key: SecretStr | None = None
