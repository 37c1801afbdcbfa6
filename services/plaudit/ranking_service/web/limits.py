"""Limits on one client: rate limits by token bucket, and bounds on the size and time of a body."""

import asyncio
import time
from collections import OrderedDict

from fastapi import Request

from plaudit.ranking_service.problems import ProblemError

BODY_TIMEOUT_S = 60.0
"""Time limit for a body to arrive: until then it holds memory and a connection."""
MAX_FORM_BYTES = 256 * 1024
"""Bound on the forms of annotators: ranks, a note, keys."""


class ClientGoneError(Exception):
    """The client disconnected before its request was complete."""


class RateLimiter:
    """A token bucket for each client: `per_minute` requests in a burst, refilled evenly. 0 sets no limit."""

    def __init__(self, per_minute: int, *, clients: int = 10_000) -> None:
        self._per_minute = per_minute
        self._clients = clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, cost: float = 1.0) -> None:
        """Take `cost` tokens from the client's bucket, or raise a `ProblemError` (429) that says when to retry."""
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
                f"at most {self._per_minute} requests a minute are allowed; retry in {wait_s:.0f} s",
                retry_after_s=int(wait_s) + 1,
            )
        self._buckets[client] = left - cost, now
        # The least recently used buckets are full by now, or soon, so dropping them changes little.
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises `ProblemError` as soon as it is known to be too large, or has taken too long."""
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
