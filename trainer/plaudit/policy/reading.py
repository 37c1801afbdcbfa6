"""Consistent reading of a model directory that another process may replace (see `plaudit.atomic`).

Failure mode: weights of one run are read with the tokenizer or value head of another, because files were replaced
between two reads, or because a kill left a replacement unfinished.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from plaudit import atomic, demo_models
from plaudit.errors import ConfigError

MODEL = "model"
"""Name of a model as a result: weights, configuration, tokenizer, and everything saved with them."""
PATIENCE_S = 10.0
"""How long to wait for another process that is moving files; it takes milliseconds."""
POLL_S = 0.02


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Wrap all reads of one model, from a directory or a hub id. (Hub models are not replaced.)

    Raises:
        ConfigError: the model was replaced during the block, so the reads are inconsistent.
    """
    settle(path)
    before = _versions(path)
    try:
        yield
    except Exception as error:
        if _is_another(path, before):
            raise _replaced(path) from error
        raise
    if _is_another(path, before):
        raise _replaced(path)


def settle(path: str | Path) -> None:
    """Finish an interrupted replacement of the model in `path`, or wait for one in progress.

    Raises:
        ConfigError: it can't be finished here, for example because the directory is read-only.
    """
    for directory in _directories(path):
        deadline = time.monotonic() + PATIENCE_S
        while atomic.is_pending(directory):
            problem = "another process holds its lock"
            try:
                with filelock.FileLock(directory / atomic.LOCK, timeout=0):
                    atomic.finish(directory)
            except filelock.Timeout:
                pass
            except OSError as error:
                # A process with write access may be about to finish it.
                problem = error.strerror or str(error)
            if atomic.is_pending(directory):
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"{directory}: a process ended while it put new files in place, and the rest of them can't be "
                        f"moved from here ({problem}): start this command once where the directory can be written to"
                    )
                time.sleep(POLL_S)


def _directories(path: str | Path) -> tuple[Path, Path]:
    """Directories where a replacement can happen: the model's, and its parent for merged models."""
    directory = Path(demo_models.resolve(path))
    return directory, directory.parent


def _versions(path: str | Path) -> list[str | None]:
    try:
        return [atomic.version(directory, MODEL) for directory in _directories(path)]
    except OSError as error:
        raise ConfigError(f"{path}: {error.filename} can't be read ({error.strerror}); delete it") from error


def _is_another(path: str | Path, before: list[str | None]) -> bool:
    settle(path)
    return _versions(path) != before


def _replaced(path: str | Path) -> ConfigError:
    return ConfigError(f"{path}: its files were replaced while they were being read: start the command again")
