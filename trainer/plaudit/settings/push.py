"""Settings of `plaudit push`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class PushConfig:
    """Upload a finished model directory to the Hugging Face hub."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs/ppo")
    """Output directory of a stage, a run's merged model, or any model or adapters. Checkpoints and logs stay here."""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")] = ""
    """Repository, such as `me/my-model`. It is created if it doesn't exist. Needs a token (HF_TOKEN or `hf auth
    login`); HF_ENDPOINT names another hub."""
    private: bool = False
    """Create the repository as a private one. One that exists keeps its visibility."""
    message: str | None = None
    """Message of the commit."""
