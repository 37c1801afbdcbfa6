"""Settings of `plaudit demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plaudit.checks import positive, require


@dataclass(frozen=True)
class DemoConfig:
    """Everything on one machine: a reward service in a separate process, PPO with its rewards, and an evaluation."""

    output_dir: Path = Path("runs/demo")
    """Directory for the run, the evaluation and the report."""
    preset: Path = Path("demo")
    """Settings file or preset of the PPO stage, as for `plaudit ppo --config`."""
    reward_model: str = "imdb-distilbert-mini"
    """Directory or hub id of the classifier that the reward service loads."""
    stages: Literal["ppo", "all"] = "ppo"
    """`all` first trains a small language model and a small reward model from scratch."""
    from_scratch_steps: int = 300
    """Optimizer steps for each of these two models. The embedded models took about ten times as many."""
    steps: int | None = None
    """PPO steps. Default: the preset's."""
    n_prompts: int = 256
    """Number of held-out prompts in the evaluation."""
    reward_url: tuple[str, ...] = ()
    """URLs of running reward services. The demo then starts none, and the policy may be a hub id."""
    ready_timeout_s: float = 120.0
    """How long the reward service may take to start."""
    seed: int = 0
    """Of sampling and of the order of prompts."""

    def __post_init__(self) -> None:
        positive(self, "steps", "ready_timeout_s", "from_scratch_steps")
        require(
            self.stages == "ppo" or not self.reward_url,
            "stages=all trains a reward model to serve; it can't be used with reward_url",
        )
        require(self.n_prompts >= 2, f"n_prompts={self.n_prompts} must be 2 or more: an interval needs two samples")
