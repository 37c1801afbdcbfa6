"""The keys that callers present, and the administrators' own. A key that is taken out of its file is refused at once.

What would be wrong here: a comment that is a key, a key that is never right for a line end behind it, or a file that
can't be read for a moment and locks everybody out or lets everybody in.
"""

import hashlib
import hmac
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REFRESH_S = 1.0
"""How long a key that has been taken out of its file may still be right."""

Log = Callable[..., None]


class KeyFileError(Exception):
    """The file gives no keys. The message says why, and what to do."""


@dataclass(frozen=True)
class Caller:
    """Whoever presents a right key."""

    name: str
    """A short digest of the key: the same for each of its requests, and no use to anybody else."""
    may_administer: bool


def read_keys(path: Path, flag: str) -> list[str]:
    """The keys in the file, one a line; empty lines and lines that begin with # are none. Raises `KeyFileError`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{flag} {path} can't be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise KeyFileError(f"{flag} {path} holds no key; write one a line")
    for key in keys:
        require_usable(key, f"{flag} {path}")
    return keys


def require_usable(key: str, where: str) -> None:
    """Raise `KeyFileError` for a key that no request can present."""
    if not (key.isascii() and key.isprintable()):
        raise KeyFileError(
            f"{where} holds a key with a control character or a letter outside ASCII, and no header carries those; "
            "make another"
        )


@dataclass
class _Keys:
    """Keys from a variable, which stay, and from a file, which is read again."""

    fixed: Sequence[str]
    file: Path | None
    flag: str
    digests: list[bytes] = field(default_factory=list)
    seen: tuple[int, int, int] | None = None

    def read_if_changed(self) -> bool:
        """Read the file if it has changed; whether it had. Raises `KeyFileError` and leaves the keys as they were."""
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
    """Who may ask, and who may reload. Without any key, everybody may do both."""

    def __init__(
        self,
        keys: Sequence[str] = (),
        *,
        file: Path | None = None,
        admin_keys: Sequence[str] = (),
        admin_file: Path | None = None,
        log: Log = lambda event, **details: None,
    ) -> None:
        """Raises `KeyFileError` when a file can't be used. Later it only logs, and the keys stay as they were."""
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
        """Whose key an `Authorization` header holds; None if it is nobody's."""
        if time.monotonic() > self._looked_at + REFRESH_S:
            self.refresh()
        scheme, _, key = header.partition(b" ")
        presented = _digest(key.strip())
        # Every key is compared, so that the time taken says nothing about which one came close.
        as_caller = [hmac.compare_digest(presented, known) for known in self._callers.digests]
        as_admin = [hmac.compare_digest(presented, known) for known in self._admins.digests]
        if scheme.lower() != b"bearer" or not (any(as_caller) or any(as_admin)):
            return None
        return Caller(presented[:8].hex(), any(as_admin))

    def refresh(self) -> None:
        """Read the files if they have changed. What can't be used is logged once, and changes nothing."""
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
