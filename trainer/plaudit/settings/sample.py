"""Settings of `plaudit sample`."""

from dataclasses import dataclass, field
from pathlib import Path

from plaudit.checks import require
from plaudit.settings.data import Data, DataSettings, PromptSettings
from plaudit.settings.people import PeopleSettings, check_url
from plaudit.settings.policy import GenerationSettings
from plaudit.wire.rankings import MAX_ANSWERS, MAX_NUMBER


@dataclass(frozen=True)
class SampleConfig:
    """Sample several answers of a policy to each prompt, for people to rank."""

    policy: str = "runs/sft"
    """Directory or hub id of a causal language model, or of adapters from `plaudit ppo`."""
    to: str = "runs/sample/answers.jsonl"
    """Destination of the answers: a JSON lines file, or the ranking service's address (http://…)."""
    output_dir: Path = Path("runs/sample")
    """Directory for a local copy of answers sent to a ranking service, from which an interrupted run continues."""
    k: int = 4
    """Number of answers to each prompt."""
    n: int = 256
    """Number of distinct prompts, all from the training split."""
    skip: int = 0
    """Number of prompts to leave out first: those that earlier rounds have asked about, with the same seed."""
    round: int = 0
    """Number of the training round, recorded with the batch."""
    people: PeopleSettings = field(default_factory=PeopleSettings)
    dataset: Data = field(default_factory=DataSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    device: str | None = None
    """`cuda`, `cuda:1`, `cpu`. Default: a GPU if there is one."""
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        require(
            2 <= self.k <= MAX_ANSWERS, f"k={self.k} must lie between 2 and {MAX_ANSWERS}: the keys 1 to 9 rank them"
        )
        require(self.n >= 1, f"n={self.n} must be 1 or more")
        require(self.skip >= 0, f"skip={self.skip} must be 0 or more")
        require(0 <= self.round <= MAX_NUMBER, f"round={self.round} must lie between 0 and {MAX_NUMBER}")
        require(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        if "://" in self.to:
            check_url("to", self.to)

    @property
    def to_service(self) -> bool:
        """Whether the answers go to a ranking service."""
        return "://" in self.to

    @property
    def file(self) -> Path:
        """The local file of answers, written in both cases."""
        return self.output_dir / "answers.jsonl" if self.to_service else Path(self.to)

    @property
    def batch(self) -> str:
        """The name of the rows' batch."""
        return self.people.batch or f"round-{self.round}"
