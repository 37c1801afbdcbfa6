"""Atomic writing of a stage's results (see `plaudit.atomic`), with errors that name the path and the remedy.

Failure modes: a full disk is reported without the path; another error is reported as a disk error.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from plaudit import atomic
from plaudit.errors import EXIT_NOT_WRITTEN, PlauditError
from plaudit.policy import reading

MODEL_ENTRIES = ("config.json", "adapter_config.json")
"""Programs recognise a model directory by one of these files."""
WEIGHTS = ("model*.safetensors", "adapter_model*", "*.safetensors.index.json", "pytorch_model*")
"""Patterns of older weight files, which a loader might prefer to the new ones."""


class NotWritten(PlauditError):
    """A file could not be written: the disk is full, or the directory is not writable. Free space, then resume."""

    exit_code = EXIT_NOT_WRITTEN
    can_be_resumed = True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert write errors in the block to `NotWritten`. The block should contain only writing.

    Raises:
        NotWritten: with the path, the reason and the free space.
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
    """Replace one file's content atomically. Raises `NotWritten`; the old file then stays."""
    with writing(path):
        atomic.write_file(path, text)


@contextmanager
def replaced_files(directory: Path, what: str, *, last: str = "") -> Iterator[Path]:
    """Yields a temporary directory. After the block, its files replace the result `what` of `directory` atomically.

    A kill leaves either the old files or the new ones. `last` is the file by which programs recognise the result. Lock
    `directory` first (`runtime.exclusive`). Raises `NotWritten`.
    """
    with writing(directory), atomic.replacing(directory, what, entries=(last,)) as beside:
        yield beside


@contextmanager
def replaced_model(directory: Path) -> Iterator[Path]:
    """`replaced_files` for a model with its configuration, tokenizer and metrics.

    Older weight files that a loader might prefer to the new ones are deleted.
    """
    with (
        writing(directory),
        atomic.replacing(directory, reading.MODEL, entries=MODEL_ENTRIES, obsolete=WEIGHTS) as beside,
    ):
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                # safetensors makes files readable only by their owner; a container's user must read them too.
                path.chmod(0o644)


def _reason(error: Exception, earlier: BaseException | None) -> str | None:
    """The operating system's reason, wherever a library has put it; None if the error has another cause.

    `earlier` is an exception that was being handled before the write began; it is ignored, with its causes.
    """
    if isinstance(error, SafetensorError):
        return re.sub(r"^.*I/O error: (.*) \(os error \d+\)$", r"\1", " ".join(str(error).split()))
    cause: BaseException | None = error
    while cause is not None and cause is not earlier:  # torch.save wraps it in a RuntimeError
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _remedy(path: Path) -> str:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free_mib = shutil.disk_usage(existing).free / 2**20
    return f"{free_mib:.1f} MiB are free there: make room, or see to it that the directory can be written to"
