"""A simulated autoscaler: a signal, averaged over a window, compared with a target. Kubernetes and Ray Serve do so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from plaudit.checks import positive, require

if TYPE_CHECKING:
    from plaudit.sizing.replica import Replica

SignalName = Literal["queue", "requests", "busy"]
TOLERANCE = 0.1
"""A ratio of signal and target this close to 1 changes nothing (the HorizontalPodAutoscaler's default)."""


@dataclass(frozen=True, slots=True)
class Signal:
    """What can be seen of the replicas at one moment."""

    queue: float
    """Texts admitted and not yet answered, per replica: plaudit_reward_queue_items."""
    requests: float
    """Requests in progress, per replica: what Ray Serve scales by."""
    busy: float
    """Share of the replicas whose model runs: what the CPU's load shows."""

    @classmethod
    def of(cls, replicas: "Sequence[Replica]") -> "Signal":
        """The signal of the replicas that are up."""
        count = max(1, len(replicas))
        return cls(
            queue=sum(replica.engine.queued_texts for replica in replicas) / count,
            requests=sum(replica.in_progress for replica in replicas) / count,
            busy=sum(replica.scoring for replica in replicas) / count,
        )


@dataclass(frozen=True)
class Autoscaler:
    """When replicas are added and taken away."""

    signal: SignalName = "queue"
    target: float = 64.0
    """The signal's value per replica that is aimed at."""
    window_s: float = 60.0
    """The signal is averaged over this time."""
    sample_s: float = 5.0
    """How often it is read."""
    period_s: float = 15.0
    """How often the number of replicas is decided."""
    down_after_s: float = 300.0
    """Replicas are taken away only when fewer have been enough for this time."""
    least: int = 1
    most: int = 8

    def __post_init__(self) -> None:
        positive(self, "target", "window_s", "sample_s", "period_s", "least")
        require(self.least <= self.most, f"least={self.least} replicas must be at most most={self.most}")

    def wanted(self, signals: Sequence[Signal], replicas: int) -> int:
        """How many replicas the signals of the window ask for: ceil(replicas x signal / target)."""
        if not signals:
            return replicas
        value = sum(getattr(signal, self.signal) for signal in signals) / len(signals)
        ratio = value / self.target
        count = replicas if abs(ratio - 1) <= TOLERANCE else math.ceil(replicas * ratio)
        return min(self.most, max(self.least, count))
