"""Reading a model directory that another process may be replacing: all that is read is of one version.

What would be wrong here: weights of one run with the tokenizer or the value head of another, because the directory's
files were replaced between two reads, or because a kill left the replacement unfinished. `plaudit.atomic` says how
directories are replaced.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from plaudit import atomic, demo_models
from plaudit.errors import ConfigError

MODEL = "model"
"""The result of a directory that is a model: weights, configuration, tokenizer, and what else was saved with them."""
PATIENCE_S = 10.0
"""How long to wait for another process that is moving files; it takes milliseconds."""
POLL_S = 0.02


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around everything that is read of a model: of a directory, or of a hub id, which nobody replaces.

    Raises:
        ConfigError: the directory's model was replaced meanwhile. What was read is of no use: start again.
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
    """Finishes a replacement of the model in `path` that was interrupted, or waits until one under way is over.

    Raises:
        ConfigError: it can't be finished here, for example since the directory is mounted read-only.
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
                # Whoever may write there may be about to.
                problem = error.strerror or str(error)
            if atomic.is_pending(directory):
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"{directory}: a process ended while it put new files in place, and the rest of them can't be "
                        f"moved from here ({problem}): start this command once where the directory can be written to"
                    )
                time.sleep(POLL_S)


def _directories(path: str | Path) -> tuple[Path, Path]:
    """Where a replacement of this model would be at work: there, or, of a merged model, in the directory above."""
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
