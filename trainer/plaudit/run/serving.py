"""A new reward model for the reward services that run already: its files where they read them, then a reload of each.

Failure modes: PPO gets scores of the old model from one service and of the new one from another. The loop therefore
continues only when every service names the revision of the new files, which is a hash of their content.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from pydantic import ValidationError

from plaudit import atomic
from plaudit.errors import ConfigError
from plaudit.policy import reading
from plaudit.rewards.errors import RewardRejected, RewardUnavailable
from plaudit.rewards.proxies import proxy_for
from plaudit.rewards.settings import without_credentials
from plaudit.run.runtime import exclusive
from plaudit.run.storage import MODEL_ENTRIES, writing
from plaudit.wire import ModelInfo, Problem
from plaudit.wire.revisions import LEGACY_WEIGHTS, MODEL_FILES, content_revision, model_files

ADMIN_KEY_VARIABLE = "REWARD_ADMIN_KEY"
REQUEST_TIMEOUT_S = 120.0
"""A reload reads the whole model."""
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0


def revision_of(directory: Path) -> str:
    """The revision that a service of this directory's model names. Raises `ConfigError`."""
    with reading.reading(directory):
        try:
            return content_revision(directory)
        except OSError as error:
            raise ConfigError(f"{directory} can't be read: {error.strerror}: {error.filename}") from error


def publish(model: Path, directory: Path) -> None:
    """Replaces the model in `directory`, which services read, by that in `model`. Raises `NotWritten`."""
    if directory.is_dir() and revision_of(directory) == revision_of(model):
        return
    obsolete = (*MODEL_FILES, *LEGACY_WEIGHTS)  # the revision covers whatever matches, so nothing else may stay
    with (
        reading.reading(model),
        exclusive(directory),
        writing(directory),
        atomic.replacing(directory, reading.MODEL, entries=MODEL_ENTRIES, obsolete=obsolete) as beside,
    ):
        for path in model_files(model):
            shutil.copyfile(path, beside / path.name)


def admin_key(file: Path | None) -> str | None:
    """The administrator's key: the first line of the file, else REWARD_ADMIN_KEY, else none. Raises `ConfigError`."""
    if file is None:
        return os.environ.get(ADMIN_KEY_VARIABLE) or None
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"admin_key_file={file} can't be read: {error}") from error
    if not lines:
        raise ConfigError(f"admin_key_file={file} is empty: the reward services' administrator's key is needed")
    return lines[0]


def reload_all(
    urls: Sequence[str],
    revision: str,
    *,
    key: str | None,
    patience_s: float,
    on_wait: Callable[[str], None] | None = None,
    transport: httpx.BaseTransport | None = None,
) -> None:
    """Has each service read its model again until all of them name `revision`, and name it one after the other.

    Raises:
        RewardUnavailable: not all of them did within `patience_s`.
        RewardRejected: one refuses the key, or is no service that can reload.
    """
    deadline, wait_s = time.monotonic() + patience_s, FIRST_WAIT_S
    while True:
        troubles = [
            trouble for url in urls if (trouble := _reloaded(url, revision, key=key, transport=transport)) is not None
        ]
        if not troubles:
            return
        if time.monotonic() + wait_s > deadline:
            raise RewardUnavailable(
                f"after reload_patience_s={patience_s:g} not all reward services serve the new model, revision "
                f"{revision[:19]}: {'; '.join(troubles)}"
            )
        if on_wait is not None:
            on_wait(f"waiting for the new reward model: {'; '.join(troubles)}")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _reloaded(url: str, revision: str, *, key: str | None, transport: httpx.BaseTransport | None) -> str | None:
    """None if the service names the revision, perhaps after a reload; else what is in the way."""
    shown = without_credentials(url).rstrip("/")
    proxy = proxy_for(url, os.environ)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with httpx.Client(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=REQUEST_TIMEOUT_S,
            transport=transport,
            proxy=proxy.url if proxy else None,
            trust_env=False,
        ) as http:
            if _revision(http.get("/v1/model"), shown) == revision:
                return None
            found = _revision(http.post("/v1/model:reload"), shown)
    except httpx.TransportError as error:
        return f"{shown}: {str(error) or type(error).__name__}"
    except _Passing as trouble:
        return f"{shown}: {trouble}"
    if found == revision:
        return None
    return f"{shown} serves {found[:19]}: does it read the loop's directory?"


class _Passing(Exception):
    """A refusal that may pass with time."""


def _revision(answer: httpx.Response, shown: str) -> str:
    where = f"{answer.request.method} {shown}{answer.request.url.path}"
    if not answer.is_success:
        try:
            detail = Problem.model_validate_json(answer.content).detail
        except ValidationError:
            detail = answer.reason_phrase
        # A failed reload may have met the files while they were being copied.
        if answer.status_code >= 500 or answer.status_code in (408, 409, 425, 429):
            raise _Passing(f"{answer.status_code}: {detail}")
        raise RewardRejected(f"{where} is refused ({answer.status_code}): {detail}")
    try:
        return ModelInfo.model_validate_json(answer.content).revision
    except ValidationError as error:
        raise RewardRejected(
            f"{where} answered something that is no ModelInfo: is that a reward service of this version?"
        ) from error
