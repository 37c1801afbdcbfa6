"""Writing to disk: a file or a directory is there whole or not at all, and a failed write says where and what to do.

What would be wrong here: half a file under the name of a whole one, or a full disk told without the place.
"""

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from plaudit.errors import EXIT_NOT_WRITTEN, PlauditError


class NotWritten(PlauditError):
    """Something could not be written: the disk is full, or the place is not writable. Make room, then go on."""

    exit_code = EXIT_NOT_WRITTEN
    can_be_resumed = True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` where the block fails to write it. Nothing but writing belongs into the block.

    Raises:
        NotWritten: with the path, the reason, and the room that is left.
    """
    earlier = sys.exception()
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, earlier)
        if reason is None:
            raise
        raise NotWritten(f"cannot write {path}: {reason}; {_remedy(path)}") from error


def write_text(path: Path, text: str) -> None:
    """Writes the file beside its place and renames it. Raises `NotWritten`; an older file is then as it was."""
    beside = path.with_name(f".{path.name}.writing")
    with writing(path):
        try:
            beside.unlink(missing_ok=True)  # the name may be a link to somebody's file
            with beside.open("x", encoding="utf-8") as file:
                file.write(text)
            sync(beside)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def files_of(directory: Path) -> Iterator[Path]:
    """A directory to write files into, which are moved to `directory` when the block ends and only if it ends well.

    Raises `NotWritten`; what was in `directory` is then as it was.
    """
    beside = directory / ".writing"
    with writing(directory):
        if beside.is_symlink():
            beside.unlink()  # to somebody's directory; ours is made anew
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            yield beside
            # A model's config last: a directory without it is no model directory.
            files = sorted(
                (path for path in beside.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json"
            )
            for file in files:
                sync(file)
            for file in files:
                place = directory / file.relative_to(beside)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def forget_other_weights(directory: Path, written: Iterable[str]) -> None:
    """Removes the weights of an earlier model that a loader would prefer to those just written in its place."""
    kept = set(written)
    for pattern in ("model*.safetensors", "*.safetensors.index.json", "pytorch_model*"):
        for path in directory.glob(pattern):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception, earlier: BaseException | None) -> str | None:
    """What the operating system said, wherever a library has put it; None if it isn't the disk's doing.

    `earlier` is what was being handled before the write began; it and its causes say nothing about the disk.
    """
    if isinstance(error, SafetensorError):
        return re.sub(r"^.*I/O error: (.*) \(os error \d+\)$", r"\1", " ".join(str(error).split()))
    cause: BaseException | None = error
    while cause is not None and cause is not earlier:  # torch.save raises a RuntimeError over it
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _remedy(path: Path) -> str:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free_mib = shutil.disk_usage(existing).free / 2**20
    return f"{free_mib:.1f} MiB are free there: make room, or see to it that the directory can be written to"
