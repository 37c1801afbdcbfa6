"""Settings of `plaudit export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class ExportConfig:
    """Write the policy of a finished or stopped run as plain Hugging Face files for other programs."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT")] = "runs/ppo"
    """Output directory of a run, or one of its checkpoints. Of a run without results, the newest checkpoint is
    taken."""
    output_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = Path("runs/export")
    """Directory for the files. It must be new or empty."""
    form: Literal["merged", "adapters"] = "merged"
    """`merged` writes a whole model with the adapters merged into it; `adapters` only the adapters, for peft and for
    servers that load adapters on a base model."""
