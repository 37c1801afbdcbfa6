"""Settings of `plaudit report` and `plaudit compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plaudit.checks import require


@dataclass(frozen=True)
class ReportConfig:
    """Write the page of one run from what it has recorded, also while it runs."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Path("runs/ppo")
    """Output directory of `plaudit ppo`."""
    file: Path | None = None
    """The page to write. Default: RUN/training.html."""


@dataclass(frozen=True)
class CompareConfig:
    """Write a page of several runs beside each other, also while they run."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Output directories of `plaudit ppo`, two or more."""
    file: Path = Path("runs/comparison.html")
    """The page to write."""

    def __post_init__(self) -> None:
        require(len(set(self.runs)) == len(self.runs), f"runs={' '.join(map(str, self.runs))}: one stands twice")
