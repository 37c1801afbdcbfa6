"""Answering prompts with what a run trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from plaudit.checks import positive, require


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with what a run trained. Settings that aren't given are the run's own."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = "runs/ppo"
    """Directory of a run, its merged model, or one of its checkpoints; or any model or adapters."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """Prompts. With none here and no file, each line of the standard input is one."""
    file: Path | None = None
    """Prompts from a text file (one a line), or from a column of a CSV, JSONL or Parquet file."""
    column: str | None = None
    """The file's column of prompts."""
    messages_column: str | None = None
    """The file's column of conversations."""
    chat: bool | None = None
    """Put each prompt into the chat template, as the user's message. Not given: where the run's prompts were
    conversations; for a model without a run's settings, where it has a chat template."""
    system: str | None = None
    """System message in front of each prompt that has none."""
    chat_template: Path | None = None
    """Jinja file in place of the chat template that the tokenizer has."""
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    """Texts that end a response where they appear."""
    json: bool = False
    """One JSON object a line: prompt, response, and whether the response ended by itself."""
    batch_size: int = 32
    """Prompts answered at once."""
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0

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
