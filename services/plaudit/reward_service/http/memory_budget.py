"""The memory budget: one bound in bytes on the bodies of all requests that are being received or answered.

Each body has its own bound, but many bodies together could still fill the memory.

Failure modes: a reservation that is never released; small requests refused because of a few large ones.
"""

import asyncio
import ctypes
import threading

from plaudit.reward_service.private_apis import PrivateApi
from plaudit.reward_service.problems import ProblemError

SMALL_BYTES = 64 * 1024
"""Requests of up to this size may use the whole budget; larger ones leave `SMALL_SHARE` of it free."""
SMALL_SHARE = 1 / 8
LARGE_BYTES = 1024 * 1024
TRIM_AFTER_S = 2.0
"""How long after a large request to return free memory to the system."""


class MemoryBudget:
    """Bytes in use, of at most `limit`. Used only by the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._trimming = False
        self._can_trim = MALLOC_TRIM.usable

    def released(self, count: int) -> None:
        """Take `count` bytes as free again."""
        self.bytes -= count
        if count >= LARGE_BYTES and self._can_trim and not self._trimming:
            self._trimming = True
            asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trimming = False
        threading.Thread(target=trim_heap, daemon=True, name="trim").start()


class Reservation:
    """One request's share of the budget. It grows while the body arrives and is released after the answer."""

    __slots__ = ("_held", "bytes")

    def __init__(self, held: MemoryBudget) -> None:
        self._held = held
        self.bytes = 0

    def grow(self, count: int) -> None:
        """Reserve `count` more bytes. Raises `ProblemError` (503) when the budget has no room."""
        held = self._held
        size = self.bytes + count
        room = held.limit if size <= SMALL_BYTES else held.limit - int(held.limit * SMALL_SHARE)
        if held.bytes + count > room and held.bytes > self.bytes:
            raise ProblemError(
                "overloaded",
                f"{held.bytes} bytes of requests are held, this one would add {count}, and {held.limit} are the bound; "
                "try again when some are answered",
                retry_after_s=1,
            )
        self.bytes = size
        held.bytes += count

    def release(self) -> None:
        """Give all bytes back."""
        if self.bytes:
            self._held.released(self.bytes)
            self.bytes = 0


def trim_heap() -> None:
    """Return free heap memory to the operating system: glibc keeps it otherwise."""
    ctypes.CDLL(None).malloc_trim(0)


def _check_trim() -> None:
    if ctypes.CDLL(None).malloc_trim(0) not in (0, 1):
        raise RuntimeError("malloc_trim gave neither 0 nor 1")


MALLOC_TRIM = PrivateApi(
    "malloc_trim of the C library",
    fallback="the allocator keeps the memory of large requests and uses it again",
    check=_check_trim,
)
