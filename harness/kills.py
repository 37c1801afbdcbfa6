"""Kills a piece of work before each of its operations on files in turn: in this process, or a real one by SIGKILL.

An operation is: opening a file for writing, fsync, creating, renaming and deleting, below one directory. Writes by
libraries in other languages (safetensors, tokenizers) are not seen, but what comes before and after them is.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OPEN_FILES = Path("/proc/self/fd")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


class Killed(BaseException):
    """The end of a process, pretended. Nobody may catch it."""


@dataclass
class _Watch:
    """Operations below `root` are counted; when `limit` are done, `end` is called before each further one."""

    root: str
    limit: int
    end: Callable[[], None]
    done: int = 0
    ended: bool = False

    def before(self, *paths: object) -> None:
        if any(str(path).startswith(self.root) for path in paths):
            if self.done >= self.limit:
                self.ended = True
                self.end()
            self.done += 1


_watch: _Watch | None = None
_hooked = False


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watch is None or (event != "open" and event not in CHANGES):
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES:
            _watch.before(path)
    elif event == "os.rename":
        _watch.before(*arguments[:2])
    else:
        # shutil.rmtree names files by the descriptor of their directory, its last argument.
        path, folder = arguments[0], arguments[-1]
        inside = isinstance(folder, int) and folder >= 0 and not Path(str(path)).is_absolute()
        _watch.before(OPEN_FILES.joinpath(str(folder)).readlink() / str(path) if inside else path)


def _counted_fsync(descriptor: int) -> None:
    """Waits for no disk: what a killed process has written is there for the next one, flushed or not."""
    if _watch is not None:
        _watch.before(OPEN_FILES.joinpath(str(descriptor)).readlink())


@contextmanager
def _watching(watch: _Watch) -> Iterator[None]:
    global _watch, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    fsync = os.fsync
    os.fsync = _counted_fsync  # type: ignore[assignment]
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        os.fsync = fsync


def killed(work: Callable[[Path], object], root: Path, operations: int) -> bool:
    """Does `work` on `root`; whether it was killed when it had done so many operations. A dead process cleans nothing
    up: every later operation fails too.
    """

    def end() -> None:
        raise Killed

    watch = _Watch(str(root), operations, end)
    with _watching(watch), contextlib.suppress(Killed):
        work(root)
    return watch.ended


def operations_of(work: Callable[[Path], object], root: Path) -> int:
    """Does `work` on `root`; how many operations that takes."""
    watch = _Watch(str(root), sys.maxsize, lambda: None)
    with _watching(watch):
        work(root)
    return watch.done


def really_killed(work: Callable[[Path], object], root: Path, operations: int) -> None:
    """The same in a forked process, by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=_until_sigkill, args=(work, root, operations))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def _until_sigkill(work: Callable[[Path], object], root: Path, operations: int) -> None:
    with _watching(_Watch(str(root), operations, lambda: os.kill(os.getpid(), signal.SIGKILL))):
        work(root)


def after_each_kill(work: Callable[[Path], object], before: Path, root: Path) -> Iterator[int]:
    """For n = 0, 1, ...: `root` is a copy of `before` on which `work` was killed after n operations, as many as there
    are. Then once more: there it was not killed.
    """
    for operations in itertools.count():
        fresh(before, root)
        was_killed = killed(work, root, operations)
        yield operations
        if not was_killed:
            return


def fresh(before: Path, root: Path) -> None:
    """Makes `root` a copy of `before`."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(before, root)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, but for what only this project reads (hidden names)."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
