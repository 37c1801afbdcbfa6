"""Simulated people who rank."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.checks import positive, require
from plaudit.rewards.settings import RewardSettings
from plaudit.settings.people import check_url


@dataclass(frozen=True)
class AnnotateConfig:
    """Simulated annotators, who rank in a ranking service as people do: to try a set-up, or for an experiment."""

    url: str = "http://127.0.0.1:8100"
    """The ranking service's address."""
    api_key_file: Path | None = None
    """File with the ranking service's key, which invites the annotators; or the environment variable RANK_API_KEY."""
    judge: str | None = None
    """What they think good: the directory or hub id of a classifier, scored here. Not given means the reward endpoints
    of --reward.url."""
    label: str = "POSITIVE"
    """Whose raw logit the judge's score is; a model with one logit has that one."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    annotators: int = 5
    """How many people."""
    temperature: tuple[float, ...] = (0.2,)
    """How noisily they judge, in the score's units: a Gumbel number times this is added to each score (Plackett-Luce).
    One value for all, or one for each annotator; 0 is without noise."""
    tie_margin: tuple[float, ...] = (0.0,)
    """Answers whose noisy scores lie this close together get the same rank. One value, or one for each annotator."""
    carelessness: tuple[float, ...] = (0.0,)
    """Share of the tasks that they rank at random. One value, or one for each annotator."""
    skips: tuple[float, ...] = (0.0,)
    """Share of the tasks that they skip. One value, or one for each annotator."""
    limit: int | None = None
    """Tasks after which an annotator stops; not given means when nothing is left."""
    concurrency: int = 4
    """Annotators at work at once."""
    patience_s: float = 60.0
    """How long to wait for a service that is away, or for tasks that others hold, before giving up."""
    device: str | None = None
    """Where the judge runs: `cuda`, `cuda:1`, `cpu`; not given means a GPU if there is one."""
    seed: int = 0

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
        """One annotator's value of a setting that may differ between them."""
        values: tuple[float, ...] = getattr(self, name)
        return values[annotator % len(values)]
