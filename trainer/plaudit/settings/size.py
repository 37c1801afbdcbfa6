"""Settings of `plaudit size`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plaudit.checks import positive, require


@dataclass(frozen=True)
class SizeConfig:
    """How many reward services a number of trainers needs, from a finished or a trial run, or from a few numbers."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Directory of a PPO run (metrics.jsonl, run.json), or of `plaudit demo`. A trial of three steps will do. Without
    it, give --step-s, --texts-per-step and --tokens-per-text."""
    trainers: int = 1
    """Trainers like this one that share the services."""
    wait: float = 0.02
    """The largest share of a step that trainers may wait for rewards."""
    judge: str = "distilbert-base"
    """What a replica takes: the name of a judge that was measured (imdb-distilbert-mini, distilbert-base,
    distilbert-base-int8: one CPU core each; distilbert-base-h100), or a JSON file, {"table": [[tokens, seconds], ...]}
    of batches."""
    replicas: int | None = None
    """Say what this number gives, in place of looking for one."""
    step_s: float | None = None
    """Seconds of a step without waiting for rewards."""
    texts_per_step: int | None = None
    """Responses of a step (ppo.batch_size)."""
    tokens_per_text: float | None = None
    """Tokens of prompt and response, as the judge counts them."""
    curve: Path | None = None
    """Draw the curve of wait and replicas into this .svg or .html file."""

    def __post_init__(self) -> None:
        positive(self, "trainers", "replicas", "step_s", "texts_per_step", "tokens_per_text")
        require(0 < self.wait < 1, f"wait={self.wait} must lie between 0 and 1: a share of a step")
        require(
            self.curve is None or self.curve.suffix in (".svg", ".html"),
            f"curve={self.curve} must end with .svg or .html",
        )
