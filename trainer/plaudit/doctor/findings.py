"""What a check has found, and how another program's output is read."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: fine, worth knowing, or wrong with the command that mends it."""

    subject: str
    status: Status
    says: str
    fix: str | None = None

    def line(self) -> str:
        """For people."""
        mend = f"\n{'':9}-> {self.fix}" if self.fix else ""
        return f"{self.status:<6}{self.subject}: {self.says}{mend}"


def ok(subject: str, says: str) -> Finding:
    """Nothing to do."""
    return Finding(subject, "ok", says)


def note(subject: str, says: str, fix: str | None = None) -> Finding:
    """Worth knowing, and no fault."""
    return Finding(subject, "note", says, fix)


def wrong(subject: str, says: str, fix: str) -> Finding:
    """A fault, and what mends it."""
    return Finding(subject, "wrong", says, fix)


def output_of(command: Sequence[str], timeout_s: float) -> tuple[bool, str]:
    """Whether a command succeeded in time, and its output; or why it failed, in one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, errors="replace")
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout_s:g} s"
    except OSError as error:
        return False, str(error.strerror)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        return False, lines[0]
    return True, done.stdout
