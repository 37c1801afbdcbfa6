"""Uploading to the Hugging Face hub what a model or trainer saves."""

import tempfile
from collections.abc import Callable
from pathlib import Path


def upload(
    repo_id: str,
    save: Callable[[Path], object],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a policy trained by PPO",
) -> str:
    """Creates the repository if need be and uploads what `save(directory)` writes, in one commit; returns its URL.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, for example without a token.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory))
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=directory, commit_message=commit_message))
