"""How long a reward service takes: a measured table of seconds by tokens in a batch, and what a request costs besides.

Failure modes: a table of one machine is used for another; a batch far beyond the table is extrapolated wrongly.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plaudit.checks import require


@dataclass(frozen=True)
class ServiceTimes:
    """One replica's times, on one kind of machine."""

    table: tuple[tuple[float, float], ...]
    """Tokens in a batch and the seconds of its forward pass, in ascending order. Linear in between; beyond the ends,
    the first and the last segment go on."""
    front_s: float = 0.0
    """Seconds that the service works on a request besides the forward pass, one request after the other: HTTP, JSON."""
    front_text_s: float = 0.0
    """The same for each text: tokenisation, validation."""
    delay_s: float = 0.0
    """Seconds of a request and its answer under way, in which nothing is busy: network, balancer."""
    one_core: bool = False
    """The model computes on the core that the front end works on, so a request that comes during a forward pass makes
    it longer: a replica of one CPU core. Off: a GPU, or a core for each."""
    client_s: float = 0.0
    """Seconds that all trainers together spend on a request one after the other: 0 if each has its own machine. The
    benchmarks' trainers share a process."""

    def __post_init__(self) -> None:
        require(bool(self.table), "the table of service times is empty: give tokens and seconds of at least one batch")
        tokens = [row[0] for row in self.table]
        require(tokens == sorted(set(tokens)), f"the tokens of the table must ascend, not {tokens}")
        for name, value in (("tokens", min(tokens)), ("seconds", min(row[1] for row in self.table))):
            require(math.isfinite(value) and value >= 0, f"the table of service times has {value} {name}")

    def batch_s(self, tokens: float) -> float:
        """Seconds of the forward pass of a batch."""
        if len(self.table) == 1:
            return self.table[0][1]
        place = bisect.bisect_left(self.table, (tokens, 0.0))
        place = min(max(place, 1), len(self.table) - 1)
        (low, low_s), (high, high_s) = self.table[place - 1 : place + 1]
        return max(0.0, low_s + (tokens - low) * (high_s - low_s) / (high - low))

    def request_s(self, texts: int) -> float:
        """Seconds that the service works on a request besides the forward pass."""
        return self.front_s + texts * self.front_text_s

    def tokens_per_s(self, batch_tokens: int, tokens_per_text: float, request_texts: int) -> float:
        """Tokens that a replica scores in a second at most, with full batches: the slower of the model and the front
        end counts, or both if they share a core."""
        per_batch = max(1, int(batch_tokens // tokens_per_text)) * tokens_per_text
        model_s = self.batch_s(per_batch) / per_batch
        front_s = self.request_s(request_texts) / (request_texts * tokens_per_text)
        return 1 / max(model_s + front_s if self.one_core else max(model_s, front_s), 1e-12)

    @classmethod
    def linear(cls, batch_s: float, token_s: float, **more: Any) -> "ServiceTimes":
        """A pass of `batch_s` seconds, and `token_s` more for each token."""
        return cls(((0.0, batch_s), (1e5, batch_s + 1e5 * token_s)), **more)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "ServiceTimes":
        """The inverse of `to_json`."""
        rows: Sequence[Sequence[float]] = document["table"]
        return cls(
            tuple((float(tokens), float(seconds)) for tokens, seconds in rows),
            **{name: type(getattr(cls, name))(value) for name, value in document.items() if name != "table"},
        )

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**vars(self), "table": [list(row) for row in self.table]}
