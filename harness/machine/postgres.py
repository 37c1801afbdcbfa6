"""A PostgreSQL server for tests, from Debian's packages. Its programs refuse root, so root runs them as `nobody`."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from tempfile import mkdtemp

from harness.processes import Program, free_port

USER = "plaudit"


def programs() -> Path | None:
    """The directory with `initdb` and `postgres`, or None where PostgreSQL isn't installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class PostgresServer:
    """A server of its own on a free port, in a directory of its own. `url()` makes a new, empty database.

    Unless it is `durable`, it doesn't wait for the disk: quicker, and the same as long as the machine doesn't crash.
    """

    def __init__(self, *, durable: bool = False) -> None:
        bin_directory = programs()
        assert bin_directory is not None, "PostgreSQL is not installed: apt-get install postgresql"
        self._bin = bin_directory
        self._who = "nobody" if os.getuid() == 0 else None
        # Not below pytest's own directory, which nobody else may enter.
        self._directory = Path(mkdtemp(prefix="plaudit-postgres-"))
        self._data = self._directory / "data"
        if self._who:
            shutil.chown(self._directory, self._who)
        self.port = free_port()
        self._made = 0
        where = ("-D", self._data, "-p", str(self.port), "-h", "127.0.0.1", "-k", self._directory)
        self._server = Program(
            *(self._bin / "postgres", *where, *(() if durable else ("-c", "fsync=off"))),
            log=self._directory / "log",
            user=self._who,
            directory=self._directory,
        )
        self._run("initdb", "-D", str(self._data), "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-locale")
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._server.begin()
        ready = [str(self._bin / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        self._server.until(lambda: subprocess.run(ready).returncode == 0, "PostgreSQL to answer")

    @property
    def stopped(self) -> bool:
        return not self._server.running

    def stop(self) -> None:
        """Stop it at once; connections are cut."""
        self._server.kill(signal.SIGQUIT)

    def url(self) -> str:
        """A new, empty database."""
        self._made += 1
        name = f"test{self._made}"
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", USER, name)
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{name}"

    def remove(self) -> None:
        """Stop it and delete its files."""
        self.stop()
        shutil.rmtree(self._directory)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._bin / program), *arguments]
        done = subprocess.run(command, user=self._who, cwd=self._directory, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
