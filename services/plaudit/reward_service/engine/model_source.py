"""Where the served model comes from: a directory or a hub model, decided once at start. No torch, no transformers.

Failure modes: a reload that finds the directory gone and downloads someone else's repository of the same name; a
revision that is the hash of other bytes than those that were loaded.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from plaudit import demo_models
from plaudit.reward_service.engine.model_files import (
    ModelError,
    ModelSource,
    file_stamps,
    looks_like_a_path,
    model_files,
    model_source,
    snapshot,
)

OPEN_FILES = Path("/proc/self/fd")
"""Paths of this process's open files, on systems that have them (Linux)."""
ATTEMPTS = 20
BETWEEN_ATTEMPTS_S = 0.05
"""A trainer that replaces a model needs milliseconds."""


@dataclass(frozen=True)
class ModelOrigin:
    """The meaning of `--model` and `--revision`: one directory, or one hub repository."""

    name: str
    """`--model` as it was given."""
    path: Path | None
    """The directory, absolute; None for a hub model."""
    revision: str | None = None
    """A hub model's branch, tag or commit, if it is pinned."""

    @classmethod
    def decide(cls, model: str, revision: str | None = None) -> "ModelOrigin":
        """A local directory, else an embedded model of that name, else a hub id. Raises `ModelError`."""
        path = Path(demo_models.resolve(model)).expanduser()
        if path.exists() and not path.is_dir():
            raise ModelError(f"{model} is a file; give the directory that holds the model")
        if path.is_dir():
            return cls(model, path.absolute())
        if looks_like_a_path(model):
            raise ModelError(f"there is no directory {model}; give a sequence-classification directory or a hub id")
        return cls(model, None, revision)

    def directory(self) -> Path:
        """Where the files are now, with all links resolved. Raises `ModelError`.

        A directory that has been removed is never looked up on the hub.
        """
        if self.path is None:
            return snapshot(self.name, self.revision).resolve()
        if not self.path.is_dir():
            raise ModelError(
                f"the directory {self.path} no longer exists; it was served as {self.name}. Restore it and reload again"
            )
        return self.path.resolve()


class ModelOrigins:
    """The origin of the served model and, for adapters, of its base model. Each is decided once."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        """Raises `ModelError`."""
        origin = ModelOrigin.decide(model, revision)
        if origin.path is not None and revision is not None:
            raise ModelError(
                f"--revision {revision} is for models of the hub, and {model} is the directory {origin.path}; leave "
                "--revision out"
            )
        self._model = model
        self._decided = {model: origin}

    def files(self) -> ModelSource:
        """Where the files are now. Raises `ModelError`."""
        return model_source(self._model, self._directory_of)

    def _directory_of(self, model: str, revision: str | None) -> Path:
        if model not in self._decided:
            self._decided[model] = ModelOrigin.decide(model, revision)
        return self._decided[model].directory()


@contextlib.contextmanager
def pinned_files(source: ModelSource) -> Iterator[ModelSource]:
    """The model's files as they are now, in directories to hash and to load.

    Every file is opened once, so the hashed bytes are the loaded bytes, even if a directory is replaced meanwhile.
    Raises `ModelError` if a directory, or the content of a file, changed before the block ends.
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-model-")))
        opened, names = _opened(source, stack)
        places: list[Path] = []
        for index, directory in enumerate(source.directories):
            place = root / str(index) / directory.name
            place.mkdir(parents=True)
            places.append(place)
            for name, file in opened[index].items():
                if OPEN_FILES.is_dir():
                    (place / name).symlink_to(OPEN_FILES / str(file.fileno()))
                else:
                    with (place / name).open("wb") as copy:
                        shutil.copyfileobj(file, copy)
        before = _stamps(opened)
        yield ModelSource(*places)
        if _stamps(opened) != before or file_stamps(*source.directories) != names:
            raise ModelError(f"{source.directory} changed while it was being read; try again when it is complete")


def _opened(
    source: ModelSource, stack: contextlib.ExitStack
) -> tuple[list[dict[str, BinaryIO]], list[tuple[str, int, int, int]]]:
    """Every file of each directory by its name, open until `stack` ends, and the stamps of all.

    Opened again where the directory became another model's in the meantime. Raises `ModelError` if it keeps changing.
    """
    for attempt in range(ATTEMPTS):
        with contextlib.ExitStack() as files:
            try:
                names = file_stamps(*source.directories)
                opened: list[dict[str, BinaryIO]] = [
                    {path.name: files.enter_context(path.open("rb")) for path in model_files(directory)}
                    for directory in source.directories
                ]
                if file_stamps(*source.directories) == names:
                    stack.enter_context(files.pop_all())
                    return opened, names
            except FileNotFoundError:
                if attempt == ATTEMPTS - 1:
                    raise
        time.sleep(BETWEEN_ATTEMPTS_S)
    raise ModelError(f"{source.directory} changes all the time; try again when it is complete")


def _stamps(opened: list[dict[str, BinaryIO]]) -> list[tuple[int, int]]:
    return [_stamp(file.fileno()) for files in opened for file in files.values()]


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
