"""What a protocol is: how it describes its model, asks for rewards and answers. It never waits and never retries."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.wire import ModelInfo, RewardItem, RewardResponse

Get = Callable[[str], Awaitable[bytes]]
"""Fetches a path below the endpoint's URL; raises unless the answer is a success."""


class BrokenBody(Exception):
    """The answer was cut off or garbled on its way; the same request may well succeed."""


class UnusableAnswer(Exception):
    """A whole answer, but not to what was asked."""


@dataclass(frozen=True)
class Call:
    """A POST below the endpoint's URL, with a JSON body."""

    path: str
    body: bytes


class Dialect(Protocol):
    name: str
    retried_statuses: frozenset[int]
    """Statuses that mean "try again" in this protocol, besides those that mean it everywhere."""

    async def describe(self, get: Get) -> ModelInfo:
        """Which model answers, its revision, labels and limits. Raises what `get` raises while it isn't ready."""

    def encode(self, items: Sequence[RewardItem], label: str | None, info: ModelInfo) -> Call:
        """The request for these items."""

    def decode(self, body: bytes, count: int, label: str | None, info: ModelInfo) -> RewardResponse:
        """The rewards in request order, all finite. Raises `BrokenBody` or `UnusableAnswer`."""
