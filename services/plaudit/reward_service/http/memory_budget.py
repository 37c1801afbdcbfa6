"""One bound, in bytes, for everything that the service holds for its callers: bodies on their way in, and their texts.

Each body has a bound of its own, but sixty of them together would fill the memory.
"""

import asyncio
import ctypes
import threading

from plaudit.reward_service.private_apis import PrivateApi
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
        self._can_trim = MALLOC_TRIM.usable

    def released(self, count: int) -> None:
        self.bytes -= count
        if count >= LARGE_BYTES and self._can_trim and not self._trimming:
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
