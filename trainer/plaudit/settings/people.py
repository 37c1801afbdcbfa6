"""Settings of the ranking service as the trainer uses it."""

from dataclasses import dataclass
from pathlib import Path

from plaudit.checks import fraction, positive, require
from plaudit.wire.rankings import MAX_INSTRUCTIONS_CHARS


@dataclass(frozen=True)
class PeopleSettings:
    """The ranking service, and the tasks for its annotators."""

    batch: str | None = None
    """The batch's name in the ranking service: letters, digits, dot, underscore, hyphen. Default: a name derived from
    the round or the answers."""
    api_key_file: Path | None = None
    """File with the ranking service's key. Alternative: RANK_API_KEY in the environment."""
    overlap: int = 3
    """Number of people who rank each task in the overlap, on which agreement is measured. All other tasks are ranked
    once."""
    overlap_share: float = 0.2
    """Share of tasks in the overlap."""
    instructions: str = ""
    """Instructions for annotators, shown above every task."""
    patience_s: float = 600.0
    """How long to retry while the ranking service is unavailable."""

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
    """Raises `ConfigError` for a batch name that the ranking service would refuse."""
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
    """Raises `ConfigError` unless `url` is an http or https address."""
    require(
        url.startswith(("http://", "https://")) and len(url) > len("https://"),
        f"{name}={url!r} must start with http:// or https://, for example http://127.0.0.1:8100",
    )
