"""Settings of `plaudit generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plaudit.checks import positive, require


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with a trained policy. Settings default to those of the training run."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "runs/ppo"
    """Output directory of a run, its merged model, one of its checkpoints, or any model or adapters."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """Prompts. Without prompts and --file, each line of standard input is a prompt."""
    file: Path | None = None
    """Read prompts from a text file (one per line), or from a column of a CSV, JSONL or Parquet file."""
    column: str | None = None
    """The file's column of prompts."""
    messages_column: str | None = None
    """The file's column of conversations."""
    chat: bool | None = None
    """Put each prompt into the chat template as the user's message. Default: if the run's prompts were conversations;
    for a model without a run's settings, if it has a chat template."""
    system: str | None = None
    """System message for each prompt without one."""
    chat_template: Path | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    max_new_tokens: int | None = None
    """Length limit of an answer, in tokens."""
    temperature: float | None = None
    """Divisor of the logits before sampling."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; 0 keeps the whole vocabulary."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability."""
    stop: tuple[str, ...] | None = None
    """Stop strings."""
    json: bool = False
    """Print one JSON object per line: prompt, response, and whether the response ended with an end token or stop
    string."""
    batch_size: int = 32
    """Prompts generated at once."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`. Default: a GPU if there is one."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens", "batch_size")
        require(not (self.texts and self.file), f"prompts are given and file={self.file}: leave one out")
        require(
            self.column is None or self.messages_column is None,
            f"column={self.column!r} and messages_column={self.messages_column!r}: name one of them",
        )
        for name in ("column", "messages_column"):
            value = getattr(self, name)
            require(value is None or self.file is not None, f"{name}={value!r} is a column of a file: give --file")
