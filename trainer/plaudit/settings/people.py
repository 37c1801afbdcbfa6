"""Where people rank answers, and what is asked of them."""

from dataclasses import dataclass
from pathlib import Path

from plaudit.checks import fraction, positive, require
from plaudit.wire.rankings import MAX_INSTRUCTIONS_CHARS


@dataclass(frozen=True)
class PeopleSettings:
    """The ranking service, and what is asked of the people there."""

    batch: str | None = None
    """The batch's name in the ranking service: letters, digits, dot, underscore, hyphen. Not given means one made from
    the answers themselves."""
    api_key_file: Path | None = None
    """File with the ranking service's key; the environment variable RANK_API_KEY is the other way."""
    overlap: int = 3
    """People who rank a task of those that agreement is measured on; one person ranks each other task."""
    overlap_share: float = 0.2
    """The share of tasks that agreement is measured on."""
    instructions: str = ""
    """What people are asked to look for, shown above every task."""
    patience_s: float = 600.0
    """How long the ranking service may stay unavailable."""

    def __post_init__(self) -> None:
        positive(self, "patience_s")
        fraction(self, "overlap_share")
        require(1 <= self.overlap <= 100, f"overlap={self.overlap} must lie between 1 and 100")
        require(
            len(self.instructions) <= MAX_INSTRUCTIONS_CHARS,
            f"instructions has {len(self.instructions)} characters; at most {MAX_INSTRUCTIONS_CHARS} are taken",
        )
        check_batch(self.batch)


def check_batch(batch: str | None) -> None:
    """Raises `ConfigError` for a name that the ranking service doesn't take."""
    usable = batch is None or (
        0 < len(batch) <= 64
        and batch.isascii()
        and batch[0].isalnum()
        and all(letter.isalnum() or letter in "._-" for letter in batch)
    )
    require(
        usable,
        f"batch={batch!r} must be 1 to 64 letters, digits, dots, underscores or hyphens, beginning with a letter",
    )


def check_url(name: str, url: str) -> None:
    """Raises `ConfigError` for what is no http address."""
    require(
        url.startswith(("http://", "https://")) and len(url) > len("https://"),
        f"{name}={url!r} must start with http:// or https://, for example http://127.0.0.1:8100",
    )
