"""Settings of `plaudit doctor`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plaudit.checks import positive

Subject = Literal[
    "python",
    "extras",
    "gpu",
    "bitsandbytes",
    "notebook",
    "hub",
    "machine",
    "preset",
    "proxies",
    "reward",
    "docker",
]


@dataclass(frozen=True)
class DoctorConfig:
    """Look at the environment and say, line by line, what is fine, what is wrong, and which command mends it."""

    reward_url: str | None = None
    """A reward service to ask: whether it is healthy, has the label, and serves the revision."""
    label: str | None = None
    """With reward_url: the label that PPO will ask for. Default: the service's."""
    revision: str | None = None
    """With reward_url: the revision that it must serve, as in a checkpoint's manifest.json."""
    preset: Path | None = None
    """Settings file or preset of `plaudit ppo`: compare its memory and disk space with what is free."""
    output_dir: Path = Path("runs")
    """Where the runs go; the free disk space is that of its file system."""
    skip: tuple[Subject, ...] = ()
    """Subjects to leave out."""
    run_torch: bool = False
    """Also import torch and compute on the GPU, and load the native library of bitsandbytes."""
    timeout_s: float = 5.0
    """How long to wait for the hub, the reward service and the Docker engine."""
    json: bool = False
    """Print one JSON object instead of lines."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")
