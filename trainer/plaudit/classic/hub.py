"""Uploading to the Hugging Face hub what a model or trainer saves."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from plaudit.run.hub import push


def upload(
    repo_id: str,
    save: Callable[[Path], object],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a policy trained by PPO",
) -> str:
    """Create the repository if it doesn't exist, upload what `save(directory)` writes in one commit, return its URL.

    Raises:
        HubUnavailable: the hub is unreachable, or answers with a passing error.
        HubRejected: the hub refuses, for example without a token.
    """
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        return push(Path(directory), repo_id, private=private, token=token, message=commit_message)
