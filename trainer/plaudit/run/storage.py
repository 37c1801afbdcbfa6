"""What stages write to disk: whole or not at all (see `plaudit.atomic`). A failed write says where and what to do.

What would be wrong here: a full disk told without the place, or an error of something else told as one of the disk.
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
"""Without one of these, no program takes a directory for a model."""
WEIGHTS = ("model*.safetensors", "adapter_model*", "*.safetensors.index.json", "pytorch_model*")
"""Names of files that a loader may prefer to those that were written in their place."""


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
    """Replaces one file by this text. Raises `NotWritten`; an older file is then as it was."""
    with writing(path):
        atomic.write_file(path, text)


@contextmanager
def replaced_files(directory: Path, what: str, *, last: str = "") -> Iterator[Path]:
    """A directory to write files into, which replace the result `what` of `directory` when the block ends well.

    They become its files together: a kill leaves the old ones or the new ones. `last` is the file by which others
    recognise the result. Hold `directory` (`runtime.exclusive`). Raises `NotWritten`.
    """
    with writing(directory), atomic.replacing(directory, what, entries=(last,)) as beside:
        yield beside


@contextmanager
def replaced_model(directory: Path) -> Iterator[Path]:
    """`replaced_files` for a model and everything that belongs to it: weights, configuration, tokenizer, figures.

    Weights of an earlier model in `directory` that a loader would prefer to the new ones are deleted.
    """
    with (
        writing(directory),
        atomic.replacing(directory, reading.MODEL, entries=MODEL_ENTRIES, obsolete=WEIGHTS) as beside,
    ):
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for its owner alone; a container's user has to read them too


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
