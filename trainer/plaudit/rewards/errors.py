"""What can go wrong with a reward, sorted by what the caller can do about it."""

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
"""Of an answer's headers, what helps a person. Cookies and challenges are not among them."""
TERMINAL_CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What JSON leaves as it is and a terminal doesn't. JSON itself escapes the controls below 32."""


@dataclass(frozen=True)
class Exchange:
    """One request and what came back, for a person to look into. Credentials are not in it."""

    method: str
    url: str
    request: str
    status: int | None = None
    headers: dict[str, str] | None = None
    answer: str | None = None


class RewardError(PlauditError):
    """No reward. The caller must not go on without one. The message is safe to print, whatever a server put into it."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class RewardUnavailable(RewardError):
    """Nobody answered within the patience. Save, stop, and start again when the service is back (exit 75)."""

    exit_code = EXIT_UNAVAILABLE
    can_be_resumed = True


class RewardRejected(RewardError):
    """What was sent is refused, or what came back can't be used: waiting won't help (exit 65)."""

    exit_code = EXIT_REJECTED

    def __init__(self, message: str, exchange: Exchange | None = None) -> None:
        super().__init__(message)
        self.exchange = exchange

    def leave_in(self, directory: Path) -> None:
        """`save`, where there were a request and an answer, and say in a note where they are, or why they are not."""
        if self.exchange is None:
            return
        try:
            self.add_note(f"the request and the answer are in {self.save(directory)}")
        except OSError as error:
            self.add_note(f"the request and the answer could not be written to {directory}: {error.strerror}")

    def save(self, directory: Path) -> Path:
        """Write the message, the request and the answer to `directory/rejected-reward.json`; gives its path.

        Only the file's owner may read it: it holds the run's texts.
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
    """A judge answered and named no score. The source asks again, a bounded number of times."""


def shown(text: str) -> str:
    """The text without control characters, so that no server clears the screen or fills the clipboard; and bounded.

    Line ends stay: messages of our own have several lines.
    """
    cut = text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}… ({len(text)} characters)"
    return "".join(
        char if char.isprintable() or char == "\n" else " " if char == "\t" else "\N{REPLACEMENT CHARACTER}"
        for char in cut
    )
