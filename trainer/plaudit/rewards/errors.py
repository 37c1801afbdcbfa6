"""Errors of the reward client, classified by what the caller can do about them."""

import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from plaudit import atomic
from plaudit.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, PlauditError

MAX_MESSAGE_CHARS = 4000
KEPT_HEADERS = frozenset(
    ("content-encoding", "content-length", "content-type", "date", "location", "retry-after", "server", "x-request-id")
)
"""Headers of an answer that are kept for diagnosis. Cookies and challenges are not among them."""
TERMINAL_CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters that JSON doesn't escape and a terminal would interpret. JSON escapes those below 32."""


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, for diagnosis. It contains no credentials."""

    method: str
    url: str
    request: str
    status: int | None = None
    headers: dict[str, str] | None = None
    answer: str | None = None


class RewardError(PlauditError):
    """There is no reward, and the caller must not continue without one. The message is safe to print in a terminal."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class RewardUnavailable(RewardError):
    """No endpoint answered within `patience_s`. Save, stop, and resume when the service is back (exit 75)."""

    exit_code = EXIT_UNAVAILABLE
    can_be_resumed = True


class RewardRejected(RewardError):
    """The request was refused, or the answer can't be used: waiting won't help (exit 65)."""

    exit_code = EXIT_REJECTED

    def __init__(self, message: str, exchange: Exchange | None = None) -> None:
        super().__init__(message)
        self.exchange = exchange

    def leave_in(self, directory: Path) -> None:
        """Save the exchange, if there is one, and add a note with its path or the reason why it couldn't be written."""
        if self.exchange is None:
            return
        try:
            self.add_note(f"the request and the answer are in {self.save(directory)}")
        except OSError as error:
            self.add_note(f"the request and the answer could not be written to {directory}: {error.strerror}")

    def save(self, directory: Path) -> Path:
        """Write the message, the request and the answer to `directory/rejected-reward.json`; returns its path.

        Only the owner may read the file, because it contains the run's texts.
        """
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "rejected-reward.json"
        record = {
            "message": str(self),
            "time": datetime.now(UTC).isoformat(),
            "exchange": asdict(self.exchange) if self.exchange else None,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        text = TERMINAL_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
        atomic.write_file(path, text + "\n", mode=0o600)
        return path


class NoScore(RewardRejected):
    """A judge's answer contains no score. The source retries a limited number of times."""


def shown(text: str) -> str:
    """The text without control characters, which could manipulate a terminal, and cut to a maximum length.

    Line breaks stay, because some of our messages have several lines.
    """
    cut = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}… ({len(text)} characters)"
    return "".join(
        char if char.isprintable() or char == "\n" else " " if char == "\t" else "\N{REPLACEMENT CHARACTER}"
        for char in cut
    )
