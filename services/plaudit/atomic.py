"""Files and directories that are replaced whole: whatever kills the process, the old is there or the new, no mixture.

Standard library only: every part of Plaudit writes by this module. There are three cases.

One file (`write_file`, `new_file`). It is written beside its place, fsynced and renamed over the old one.

One directory of its own, such as a checkpoint (`new_directory`). It is filled beside its place, fsynced and renamed.

Some files of a directory that holds other things too (`replacing`): a model beside its checkpoints, metrics and lock.

1. The new files are written to `DIR/.writing` and fsynced. A kill leaves the old ones, and litter that the next write
   removes.
2. `DIR/.writing` is renamed to `DIR/.replacing`. From this moment on the new files count.
3. The old entries (`config.json`, say, without which no program takes the directory for a model) are deleted, then
   files of the old result that the new one lacks. The new files are moved to their places, the entries last. A kill
   leaves `DIR/.replacing`. Whoever next writes to the directory or reads from it moves the rest (`finish`); who may
   only read finds each file where it is (`current_files`). A program that knows nothing of this finds the old model,
   no model, or the new one.

This needs nothing of the file system but that a rename within a directory is atomic: ext4, XFS, Btrfs, tmpfs, overlayfs
and NFS all promise it. Exchanging two directories in one call (Linux's RENAME_EXCHANGE) is not used: NFS has no such
call, overlayfs refuses it for directories of a lower layer, and an output directory is often a mount point (a volume, a
bind mount), which nobody can rename. A symbolic link to the newest version is not used: what copies a directory may
copy the link alone.

What can still go wrong:

- Two writers at once. Hold the directory's lock (`LOCK`) around `replacing` and `finish`; `plaudit.run.runtime` does.
- A reader that opens files one by one while step 3 runs may open some old and some new ones. It must compare `version`
  before and after, as `plaudit.policy.reading` and the reward service do. Other programs don't.
- On NFS another machine may see the old names for as long as its attribute cache lives (a minute by default). Opening
  a file that has gone then fails (ESTALE); it doesn't give the bytes of another file.
- A disk that reports a flush it has not done can lose anything.
"""

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LOCK = ".lock"
"""Whoever writes to a directory holds an exclusive `flock` on this file in it."""
WRITING = ".writing"
REPLACING = ".replacing"
PLAN = ".plan"
"""In `REPLACING`: what the replacement consists of. It becomes the record of the result in the end."""


@dataclass(frozen=True)
class _Plan:
    """One replacement, or, when it is over, the record of a result. Names are relative to the directory, with `/`."""

    what: str
    version: str
    """Different for every replacement."""
    put: tuple[str, ...]
    entries: tuple[str, ...]
    """Those of `put` by which other programs recognise the result."""
    remove: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> "_Plan | None":
        """The plan in a file; None where there is no such file. Raises `OSError` for one that is damaged."""
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            known = json.loads(text)
            names = {key: tuple(map(_inside, known[key])) for key in ("put", "entries", "remove")}
            return cls(what=_inside(known["what"]), version=str(known["version"]), **names)
        except (ValueError, KeyError, TypeError) as error:
            raise OSError(errno.EIO, f"is no record of a replacement ({error})", str(path)) from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=2) + "\n", encoding="utf-8")
        path.chmod(0o644)  # who may read the result may know which it is


def write_file(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replaces one file by this text (UTF-8). `mode` and errors are those of `new_file`."""
    with new_file(path, mode=mode) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


@contextmanager
def new_file(path: Path, *, mode: int = 0o666) -> Iterator[Path]:
    """An empty file to write into, which replaces `path` when the block ends, and only if it ends well.

    It may be read as `mode` and the umask say. Raises `OSError`; the old file is then as it was.
    """
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.unlink(missing_ok=True)  # the name may be a link to somebody's file
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_directory(final: Path, *, beside: Path | None = None, marker: str = "") -> Iterator[Path]:
    """A directory to fill, which becomes `final` when the block ends, and only if it ends well.

    `beside` is where it is filled. One that is at `final` already stays until then, and a kill between the two renames
    leaves it as `final.replaced`; it is deleted afterwards, its file `marker` first. Raises `OSError`.
    """
    beside = beside or final.with_name(f".{final.name}.writing")
    replaced = final.with_name(f"{final.name}.replaced")
    remove_directory(beside)
    try:
        beside.mkdir(parents=True)
        yield beside
        for path in sorted(beside.rglob("*")):
            sync(path)
        sync(beside)
    except BaseException:
        # Its room is needed for whatever comes next.
        remove_directory(beside)
        raise
    if final.exists():
        remove_directory(replaced, marker=marker)
        final.rename(replaced)
    beside.rename(final)
    sync(final.parent)
    remove_directory(replaced, marker=marker)


@contextmanager
def replacing(
    directory: Path, what: str, *, entries: Sequence[str] = (), obsolete: Sequence[str] = ()
) -> Iterator[Path]:
    """A directory to write into, whose files replace the result `what` of `directory` when the block ends well.

    Files of the earlier result of that name that the new one lacks are deleted, as are files that match `obsolete` (a
    record of the earlier result may be missing). Everything else in `directory` stays. Files whose names are among
    `entries`, in sub-directories too, are deleted first and put last. The caller holds `LOCK`.

    Raises:
        OSError: before the new files were complete; the old ones are as they were. Or later: `finish` then goes on.
    """
    finish(directory)
    if (directory / REPLACING).is_symlink():
        (directory / REPLACING).unlink()  # to somebody's directory; ours is made anew
    with new_directory(directory / REPLACING, beside=directory / WRITING) as beside:
        yield beside
        put = tuple(sorted(path.relative_to(beside).as_posix() for path in beside.rglob("*") if path.is_file()))
        earlier = _Plan.read(directory / _record(what))
        old = {path.name for pattern in obsolete for path in directory.glob(pattern) if path.is_file()}
        old |= set() if earlier is None else set(earlier.put)
        ends = tuple(name for name in put if PurePosixPath(name).name in entries)
        # Whoever finds the directory's own entry finds its sub-directories complete.
        ends = tuple(sorted(ends, key=lambda name: -name.count("/")))
        # Without its entry, nobody takes what is left of a sub-directory for a whole result.
        gone = tuple(sorted(old - set(put), key=lambda name: (PurePosixPath(name).name not in entries, name)))
        _Plan(what, uuid.uuid4().hex, put, ends, gone).write(beside / PLAN)
    finish(directory)


def finish(directory: Path) -> bool:
    """Does what is left of a replacement that was interrupted; whether there was one. The caller holds `LOCK`.

    Raises `OSError`; what is left then stays to be done.
    """
    pending = directory / REPLACING
    if not pending.is_dir() or pending.is_symlink():
        return False
    plan = _Plan.read(pending / PLAN)
    if plan is not None:
        # An entry that has been moved already is the new one.
        for name in (*(name for name in plan.entries[::-1] if (pending / name).exists()), *plan.remove):
            (directory / name).unlink(missing_ok=True)
        sync(directory)
        for name in (*(name for name in plan.put if name not in plan.entries), *plan.entries):
            place = directory / name
            if (pending / name).exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                (pending / name).replace(place)
        for folder in {(directory / name).parent for name in (*plan.put, *plan.remove)} - {directory}:
            with contextlib.suppress(OSError):
                folder.rmdir()  # one that nothing is in any more
            if folder.is_dir():
                sync(folder)
        sync(directory)
        (pending / PLAN).replace(directory / _record(plan.what))
    remove_directory(pending)
    sync(directory)
    return True


def is_pending(directory: Path) -> bool:
    """Whether a replacement has begun to count and is not finished; also one that somebody else keeps to themselves."""
    try:
        return (directory / REPLACING / PLAN).is_file()
    except PermissionError:
        return True


def version(directory: Path, what: str) -> str | None:
    """Names the result `what` of a directory: another name after every replacement. None for a result of others.

    Raises `OSError` for a record that is damaged.
    """
    record = _Plan.read(directory / _record(what))
    return None if record is None else record.version


def recorded_files(directory: Path, what: str) -> tuple[str, ...] | None:
    """The names of the files of the result `what`, relative to the directory; None for a result of others.

    Raises `OSError` for a record that is damaged.
    """
    record = _Plan.read(directory / _record(what))
    return None if record is None else record.put


def current_files(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory that match, each where it is now: those of an unfinished replacement stand for the old.

    Give `pattern` without a sub-directory. Raises `OSError` for a record that is damaged.
    """
    found = {path.name: path for path in directory.glob(pattern) if path.is_file()}
    pending = directory / REPLACING
    plan = _Plan.read(pending / PLAN)
    if plan is not None:
        found = {name: path for name, path in found.items() if name not in plan.remove}
        found |= {path.name: path for path in pending.glob(pattern) if path.name in plan.put}
    return [found[name] for name in sorted(found)]


def remove_directory(directory: Path, *, marker: str = "") -> None:
    """Deletes a directory as far as that is possible, its file `marker` first: without it, the rest is litter.

    Of a symbolic link, the link: what it points to is somebody else's.
    """
    if directory.is_symlink():
        directory.unlink()
        return
    if marker:
        (directory / marker).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for directories, and need none.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _record(what: str) -> str:
    # No *.json: the hash of a model's files must not depend on when they were written.
    return f".{what}.files"


def _inside(name: object) -> str:
    """A name that leads nowhere but into its directory. Raises `ValueError`."""
    if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} is no name in a directory")
    return name
