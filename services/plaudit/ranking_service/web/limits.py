"""How much one client may ask for: token buckets, and bodies with a bound on size and time."""

import asyncio
import time
from collections import OrderedDict

from fastapi import Request

from plaudit.ranking_service.problems import ProblemError

BODY_TIMEOUT_S = 60.0
"""How long a body may take to arrive. A client that sends no more holds memory and a connection for nothing."""
MAX_FORM_BYTES = 256 * 1024
"""What people send: ranks, a note, keys."""


class ClientGoneError(Exception):
    """The client closed the connection before its request was complete."""


class RateLimiter:
    """A token bucket for each client: `per_minute` requests in a burst, refilled evenly. 0 sets no limit."""

    def __init__(self, per_minute: int, *, clients: int = 10_000) -> None:
        self._per_minute = per_minute
        self._clients = clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, cost: float = 1.0) -> None:
        """Take from the client's bucket, or raise `ProblemError` that says when to come again."""
        if not self._per_minute:
            return
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - then) * self._per_minute / 60)
        if left < cost:
            self._buckets[client] = left, now
            wait_s = (cost - left) * 60 / self._per_minute
            raise ProblemError(
                "too-many-requests",
                f"at most {self._per_minute} requests a minute are taken; come again in {wait_s:.0f} s",
                retry_after_s=int(wait_s) + 1,
            )
        self._buckets[client] = left - cost, now
        # Whoever has asked least recently has a full bucket by now, or soon.
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise ProblemError("body-too-large", f"the body has {declared} bytes; at most {limit} are taken")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise ProblemError("body-too-large", f"the body has more than the {limit} bytes that are taken")
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise ProblemError("request-timeout", f"the body didn't arrive within {BODY_TIMEOUT_S:g} s") from None
