"""Prometheus metrics. Each service has its own registry, so that two in one process don't share their counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """Counters and histograms by the name they have on `/metrics`, without the `plaudit_reward_` prefix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

        def name(suffix: str) -> str:
            return f"plaudit_reward_{suffix}"

        self.responses = Counter(
            name("responses"), "HTTP answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.admitted_items = Counter(name("admitted_items"), "Texts taken into the queue.", registry=self.registry)
        self.refused_requests = Counter(
            name("refused_requests"), "Requests refused, by the problem's name.", ["reason"], registry=self.registry
        )
        self.dropped_items = Counter(
            name("dropped_items"),
            "Texts dropped before the forward pass: client gone, deadline passed, or a sibling failed.",
            registry=self.registry,
        )
        self.failed_items = Counter(name("failed_items"), "Texts whose forward pass failed.", registry=self.registry)
        self.scored_items = Counter(name("scored_items"), "Texts scored.", registry=self.registry)
        self.cached_items = Counter(name("cached_items"), "Texts answered from the cache.", registry=self.registry)
        self.batch_tokens = Histogram(
            name("batch_tokens"), "Real tokens in a batch.", buckets=TOKEN_BUCKETS, registry=self.registry
        )
        self.padding_share = Histogram(
            name("batch_padding_share"),
            "Share of a batch that is padding.",
            buckets=(0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
            registry=self.registry,
        )
        self.phase = Histogram(
            name("phase_seconds"),
            "Seconds of a request in each phase: tokenize, queue, inference.",
            ["phase"],
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.queue_items = Gauge(name("queue_items"), "Texts admitted and not yet answered.", registry=self.registry)
        self.queue_tokens = Gauge(
            name("queue_tokens"), "Their tokens (estimated until tokenised).", registry=self.registry
        )
        self.model = Gauge(
            name("model_info"), "The model that is served now.", ["model", "revision", "dtype"], registry=self.registry
        )

    def exposition(self) -> bytes:
        """The text format of everything above."""
        return generate_latest(self.registry)
