"""What can go wrong with a reward, sorted by what the caller can do about it."""

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from plaudit.errors import EXIT_REJECTED, EXIT_UNAVAILABLE, PlauditError


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
    """No reward. The caller must not go on without one."""


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
        """Write the message, the request and the answer to `directory/rejected-reward.json`; gives its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "rejected-reward.json"
        record = {
            "message": str(self),
            "time": datetime.now(UTC).isoformat(),
            "exchange": asdict(self.exchange) if self.exchange else None,
        }
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return beside.replace(path)
