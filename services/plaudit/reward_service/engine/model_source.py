"""Where the served model comes from: decided once, at the start, and never again.

What would be wrong here: a reload that finds the directory gone and fetches a stranger's repository of the same name,
or a revision that names other bytes than those that were loaded. Quick to import: no torch, no transformers.
"""

import contextlib
import os
import shutil
import tempfile
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
"""Names of this process's open files, where the system has them (Linux)."""


@dataclass(frozen=True)
class ModelOrigin:
    """What `--model` and `--revision` mean: one directory, or one hub repository."""

    name: str
    """As it was given."""
    path: Path | None
    """The directory, absolute; None for a hub model."""
    revision: str | None = None
    """A hub model's branch, tag or commit, where it is pinned."""

    @classmethod
    def decide(cls, model: str, revision: str | None = None) -> "ModelOrigin":
        """A directory here, else the embedded model of that name, else a hub id. Raises `ModelError`."""
        path = Path(demo_models.resolve(model)).expanduser()
        if path.exists() and not path.is_dir():
            raise ModelError(f"{model} is a file; give the directory that holds the model")
        if path.is_dir():
            return cls(model, path.absolute())
        if looks_like_a_path(model):
            raise ModelError(f"there is no directory {model}; give a sequence-classification directory or a hub id")
        return cls(model, None, revision)

    def directory(self) -> Path:
        """Where the files are now, with every link on the way resolved. Raises `ModelError`.

        A directory that has gone stays gone: the hub is not asked for it.
        """
        if self.path is None:
            return snapshot(self.name, self.revision).resolve()
        if not self.path.is_dir():
            raise ModelError(
                f"the directory {self.path} has gone; it was served as {self.name}. Put it back and reload again"
            )
        return self.path.resolve()


class ModelOrigins:
    """The served model's origin and, if it is a directory of adapters, its base model's: each is decided once."""

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
    """The model's files as they are at this moment, in directories to hash and to load.

    Every file is opened once, so what is hashed is what is loaded, even if a directory becomes another model's in the
    meantime. Raises `ModelError` if a directory or the bytes of a file changed before the block ends.
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plaudit-model-")))
        names = file_stamps(*source.directories)
        opened: list[BinaryIO] = []
        places: list[Path] = []
        for index, directory in enumerate(source.directories):
            place = root / str(index) / directory.name
            place.mkdir(parents=True)
            places.append(place)
            for path in model_files(directory):
                opened.append(stack.enter_context(path.open("rb")))
                if OPEN_FILES.is_dir():
                    (place / path.name).symlink_to(OPEN_FILES / str(opened[-1].fileno()))
                else:
                    with (place / path.name).open("wb") as copy:
                        shutil.copyfileobj(opened[-1], copy)
        before = [_stamp(file.fileno()) for file in opened]
        yield ModelSource(*places)
        if [_stamp(file.fileno()) for file in opened] != before or file_stamps(*source.directories) != names:
            raise ModelError(f"{source.directory} changed while it was being read; try again when it is complete")


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
