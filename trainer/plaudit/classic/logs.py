"""What a program's run tells: trackers, a table of samples, the times of a step, and a model card."""

import time
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from plaudit.classic.config import PPOConfig
from plaudit.parallel.processes import Processes
from plaudit.run.hub import front_matter

CARD_TAGS = ("ppo", "rlhf")


def start_trackers(accelerator: Accelerator, config: PPOConfig) -> None:
    """Starts `config.log_with` with the run's settings."""
    known = config.to_dict()
    if config.log_with == "tensorboard":
        known = {name: value for name, value in known.items() if isinstance(value, bool | int | float | str)}
    else:
        known = {"trl_ppo_trainer_config": known}
    accelerator.init_trackers(config.tracker_project_name, config=known, init_kwargs=config.tracker_kwargs)


def log_table(
    accelerator: Accelerator,
    processes: Processes,
    batch: Mapping[str, Any],
    rewards: Tensor,
    columns: tuple[str, ...],
    *,
    step: int,
) -> None:
    """Sends a table of all processes' samples to wandb. Raises `ValueError` if `batch` lacks one of the columns."""
    missing = [name for name in columns if name not in batch]
    if missing:
        raise ValueError(f"columns_to_log names {missing[0]!r}, and the batch has {sorted(batch)}")
    parts = processes.on_all(lambda: [list(batch[name]) for name in columns])
    cells = [[cell for part in parts for cell in part[i]] for i in range(len(columns))]
    rows = [list(row) for row in zip(*cells, rewards.tolist(), strict=True)]
    if accelerator.is_main_process:
        tracker = accelerator.get_tracker("wandb")
        tracker.log_table("game_log", columns=[*columns, "reward"], data=rows, step=step)


def model_card(config: PPOConfig, name: str | None, *, steps: int, samples: int, adapters: bool) -> str:
    """The card of a trained policy, after so many steps of so many samples."""
    settings = "\n".join(f"| {key} | {value} |" for key, value in config.to_dict().items())
    front = front_matter(
        config.model_name, library="peft" if adapters else "transformers", pipeline="text-generation", tags=CARD_TAGS
    )
    return f"""{front}

# {name or f"{config.model_name}, tuned by PPO"}

Trained for {steps} PPO steps of {samples} samples. The value head is in
`value_head.safetensors`; `plaudit.classic.AutoModelForCausalLMWithValueHead.from_pretrained` loads it too.

| setting | value |
| --- | --- |
{settings}
"""


class Clock:
    """Seconds since the last look."""

    def __init__(self, now: float) -> None:
        self._last = now

    def lap(self) -> float:
        """Seconds since the last call, or since `now` of the beginning."""
        now = time.perf_counter()
        self._last, seconds = now, now - self._last
        return seconds
