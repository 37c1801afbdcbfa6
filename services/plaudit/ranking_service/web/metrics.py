"""Prometheus metrics. Each service has its own registry, so that two in one process don't share their counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """Counters and histograms by the name they have on `/metrics`, without the `plaudit_rank_` prefix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()

        def name(suffix: str) -> str:
            return f"plaudit_rank_{suffix}"

        self.responses = Counter(
            name("responses"), "HTTP answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.refused = Counter(
            name("refused_requests"), "Requests refused, by the problem's name.", ["reason"], registry=self.registry
        )
        self.submissions = Counter(
            name("submissions"), "Recorded submissions, by status.", ["status"], registry=self.registry
        )
        self.replays = Counter(
            name("replayed_submissions"), "Submissions that had been recorded before.", registry=self.registry
        )
        self.submit_seconds = Histogram(
            name("submit_seconds"),
            "Time from a submission's arrival to its record on disk.",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.handed_out = Counter(name("tasks_shown"), "Times a task was shown.", registry=self.registry)
        self.open_batches = Gauge(name("open_batches"), "Batches that are not closed.", registry=self.registry)
        self.rankings_wanted = Gauge(
            name("rankings_wanted"), "Rankings that a batch needs.", ["batch"], registry=self.registry
        )
        self.rankings_counted = Gauge(
            name("rankings_counted"), "Rankings of a batch that count.", ["batch"], registry=self.registry
        )

    def exposition(self) -> bytes:
        """The text format of everything above."""
        return generate_latest(self.registry)
