"""API keys of callers and administrators. A key that is removed from its file is refused within a second.

Failure modes: a comment line that works as a key; a key that never matches because of its line end; a file that can't
be read for a moment and locks out every caller, or admits everyone.
"""

import hashlib
import hmac
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REFRESH_S = 1.0
"""How long a key may stay valid after it is removed from its file."""

Log = Callable[..., None]


class KeyFileError(Exception):
    """The key file can't be used. The message says why, and what to do."""


@dataclass(frozen=True)
class Caller:
    """The owner of a valid key."""

    name: str
    """A short digest of the key: the same in all requests, and useless as a key."""
    may_administer: bool


def read_keys(path: Path, flag: str) -> list[str]:
    """The keys in the file, one on each line. Empty lines and lines that begin with # are skipped.

    Raises `KeyFileError`; `flag` names the setting in its message.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{flag} {path} can't be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise KeyFileError(f"{flag} {path} holds no key; write one on each line")
    for key in keys:
        require_usable(key, f"{flag} {path}")
    return keys


def require_usable(key: str, where: str) -> None:
    """Raise `KeyFileError` for a key that no request can present."""
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(
            f"{where} holds a key with a control character or a character outside ASCII, which no header can carry; "
            "make another"
        )


@dataclass
class _Keys:
    """Keys from an environment variable, which are fixed, and from a file, which is read again when it changes."""

    fixed: Sequence[str]
    file: Path | None
    flag: str
    digests: list[bytes] = field(default_factory=list)
    seen: tuple[int, int, int] | None = None

    def read_if_changed(self) -> bool:
        """Read the file if it has changed, and say whether it had. On `KeyFileError` the keys stay as they were."""
        if self.file is None:
            changed = not self.digests and bool(self.fixed)
            self.digests = [_digest(key.encode()) for key in self.fixed]
            return changed
        try:
            status = self.file.stat()
        except OSError as error:
            raise KeyFileError(f"{self.flag} {self.file} can't be read: {error}") from None
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp == self.seen:
            return False
        self.seen = stamp
        self.digests = [_digest(key.encode()) for key in [*self.fixed, *read_keys(self.file, self.flag)]]
        return True


class Keys:
    """Authentication: who may send requests, and who may reload the model. Without any key, everyone may do both."""

    def __init__(
        self,
        keys: Sequence[str] = (),
        *,
        file: Path | None = None,
        admin_keys: Sequence[str] = (),
        admin_file: Path | None = None,
        log: Log = lambda event, **details: None,
    ) -> None:
        """Raises `KeyFileError` if a file can't be used. Later failures are logged, and the keys stay as they were."""
        self._callers = _Keys(keys, file, "--api-key-file")
        self._admins = _Keys(admin_keys, admin_file, "--admin-key-file")
        self._log = log
        self._looked_at = time.monotonic()
        self._complained: str | None = None
        for kind in (self._callers, self._admins):
            kind.read_if_changed()
            if kind.file is not None and kind.file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                mode = stat.S_IMODE(kind.file.stat().st_mode)
                log(
                    "key-file-readable",
                    file=str(kind.file),
                    mode=f"{mode:04o}",
                    detail="others on this machine can read the keys: chmod 600",
                )
        self.required = bool(self._callers.digests or self._admins.digests)

    def authenticate(self, header: bytes) -> Caller | None:
        """The owner of the key in an `Authorization` header; None if the key is not valid."""
        if time.monotonic() > self._looked_at + REFRESH_S:
            self.refresh()
        scheme, _, key = header.partition(b" ")
        presented = _digest(key.strip())
        # Every key is compared, in constant time, so that the time doesn't tell which one nearly matched.
        as_caller = [hmac.compare_digest(presented, known) for known in self._callers.digests]
        as_admin = [hmac.compare_digest(presented, known) for known in self._admins.digests]
        if scheme.lower() != b"bearer" or not (any(as_caller) or any(as_admin)):
            return None
        return Caller(presented[:8].hex(), any(as_admin))

    def refresh(self) -> None:
        """Read the files if they have changed. A file that can't be used is logged once, and changes nothing."""
        self._looked_at = time.monotonic()
        for kind in (self._callers, self._admins):
            try:
                if kind.read_if_changed():
                    self._log("keys-read", file=str(kind.file), keys=len(kind.digests))
                    self._complained = None
            except KeyFileError as error:
                if str(error) != self._complained:
                    self._complained = str(error)
                    self._log("keys-failed", detail=f"{error}; the keys from before stay valid")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
