"""Settings of `plaudit annotate`."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.people import check_url


@dataclass(frozen=True)
class AnnotateConfig:
    """Simulated annotators who rank tasks in a ranking service like people, for tests and experiments."""

    url: str = "http://127.0.0.1:8100"
    """The ranking service's address."""
    api_key_file: Path | None = None
    """File with the ranking service's key, needed to invite the annotators. Alternative: RANK_API_KEY in the
    environment."""
    judge: str | None = None
    """Directory or hub id of a classifier that defines the annotators' preferences. It runs in this process. Default:
    the endpoints of --reward.url."""
    label: str = "POSITIVE"
    """The label whose raw logit is the judge's score. Ignored for a model with a single logit."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    annotators: int = 5
    """Number of simulated annotators."""
    temperature: tuple[float, ...] = (0.2,)
    """Scale of the Gumbel noise added to each score (Plackett-Luce), in units of the score; 0 means no noise. One value
    for all, or one for each annotator."""
    tie_margin: tuple[float, ...] = (0.0,)
    """Answers whose noisy scores lie this close together get the same rank. One value, or one for each annotator."""
    carelessness: tuple[float, ...] = (0.0,)
    """Share of tasks ranked at random. One value, or one for each annotator."""
    skips: tuple[float, ...] = (0.0,)
    """Share of tasks skipped. One value, or one for each annotator."""
    limit: int | None = None
    """Number of tasks after which an annotator stops. Default: no limit."""
    concurrency: int = 4
    """Annotators that work in parallel."""
    patience_s: float = 60.0
    """How long to wait for an unreachable service, or for tasks leased to others, before stopping."""
    device: str | None = None
    """The judge's device: `cuda`, `cuda:1`, `cpu`. Default: a GPU if there is one."""
    seed: int = 0
    """Of the simulated annotators' noise."""

    def __post_init__(self) -> None:
        check_url("url", self.url)
        positive(self, "annotators", "concurrency", "patience_s", "limit")
        for name in ("temperature", "tie_margin", "carelessness", "skips"):
            values: tuple[float, ...] = getattr(self, name)
            require(
                len(values) in (1, self.annotators),
                f"{name} has {len(values)} values for annotators={self.annotators}: give one for all, or one for each",
            )
            upper = 1.0 if name in ("carelessness", "skips") else float("inf")
            for value in values:
                bound = "between 0 and 1" if upper == 1 else "at 0 or above, and be finite"
                require(0 <= value <= upper and value != float("inf"), f"{name}={value} must lie {bound}")
        asks = self.reward.says_whom_to_ask
        require(
            not (self.judge is not None and asks),
            f"judge={self.judge!r} and reward.url are both given; the annotators have one judge: leave one out",
        )

    def of(self, name: str, annotator: int) -> float:
        """The value of setting `name` for annotator number `annotator`."""
        values: tuple[float, ...] = getattr(self, name)
        return values[annotator % len(values)]
