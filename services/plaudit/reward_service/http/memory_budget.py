"""One bound, in bytes, for everything that the service holds for its callers: bodies on their way in, and their texts.

Each body has a bound of its own, but sixty of them together would fill the memory.
"""

import asyncio
import ctypes
import sys
import threading

from plaudit.reward_service.problems import ProblemError

SMALL_BYTES = 64 * 1024
"""Of requests up to this size, those that come last still find room."""
SMALL_SHARE = 1 / 8
LARGE_BYTES = 1024 * 1024
TRIM_AFTER_S = 2.0
"""After a large request: when to give its memory back to the system."""


class MemoryBudget:
    """How much is held, of at most `limit`. Used by the event loop alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._trimming = False

    def released(self, count: int) -> None:
        self.bytes -= count
        if count >= LARGE_BYTES and not self._trimming:
            self._trimming = True
            asyncio.get_running_loop().call_later(TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trimming = False
        threading.Thread(target=trim_heap, daemon=True, name="trim").start()


class Reservation:
    """What one request holds."""

    __slots__ = ("_held", "bytes")

    def __init__(self, held: MemoryBudget) -> None:
        self._held = held
        self.bytes = 0

    def grow(self, count: int) -> None:
        """Raises `ProblemError` when there is no room."""
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
        if self.bytes:
            self._held.released(self.bytes)
            self.bytes = 0


def trim_heap() -> None:
    """Have the C library return what is free to the system. It keeps freed memory for itself otherwise (glibc)."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            return  # another C library, which has no such function
