"""Uploading to the Hugging Face hub what a model or trainer saves."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from plaudit.classic.config import PPOConfig
from plaudit.run.hub import HubRejected, HubUnavailable, push


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


class BestUploads:
    """Which steps' policies are uploaded: every `compare_steps`-th, if its mean score is the highest so far."""

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        self._highest, self._compared = -float("inf"), 0

    def is_beaten_by(self, score: float) -> bool:
        """Whether a step with this mean score is to be uploaded. Call it once a step."""
        if not self._config.push_to_hub_if_best_kwargs:
            return False
        compares = self._compared % self._config.compare_steps == 0
        self._compared += 1
        if not compares or score <= self._highest:
            return False
        self._highest = score
        return True


def upload_best(upload_policy: Callable[[], object]) -> None:
    """Call `upload_policy`. A hub that doesn't take the policy is a warning: training goes on."""
    try:
        upload_policy()
    except (HubRejected, HubUnavailable) as error:
        warnings.warn(f"the best policy so far was not uploaded: {error}", stacklevel=3)
