"""The responses of every step on disk, as JSON lines that `datasets.load_dataset("json", …)` reads.

A file holds whole steps. Each step replaces the newest file atomically: a kill leaves it with the step or without it.

Failure modes: a resumed run writes a step twice; a kill leaves half a line, on which readers fail.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plaudit.learner.rollout import CollectedRollout
from plaudit.learner.stepper import StepResult
from plaudit.ppo.masked import masked_mean, masked_sum
from plaudit.run.storage import write_text, writing
from plaudit.settings.watch import WatchSettings

DIRECTORY = "rollouts"
MIB = 2**20


class RolloutLog:
    """Writes the rollouts of a run's steps below `directory`. Only rank 0 has one."""

    def __init__(self, directory: Path, settings: WatchSettings) -> None:
        self._directory, self._settings = directory / DIRECTORY, settings
        files = rollout_files(directory)
        self._path = files[-1] if files else None
        self._text = self._path.read_text(encoding="utf-8") if self._path is not None else ""

    def write(self, step: int, collected: CollectedRollout, result: StepResult) -> None:
        """Write the responses of one step that the settings ask for. Raises `NotWritten`."""
        count = len(collected.responses)
        if self._settings.rollouts == "off":
            return
        kept = count if self._settings.rollouts == "all" else min(count, self._settings.rollouts_per_step)
        indices = [i * count // kept for i in range(kept)]
        lines = "".join(
            json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
            for row in rollout_rows(step, collected, result, indices)
        )
        path, text = self._path, self._text
        if path is None or (text and len(text.encode()) + len(lines.encode()) > self._settings.rollout_file_mib * MIB):
            path, text = self._directory / f"from-step-{step:06d}.jsonl", ""
        with writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
        write_text(path, text + lines)
        self._path, self._text = path, text + lines


def rollout_rows(
    step: int, collected: CollectedRollout, result: StepResult, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """One record for each of these rows of the batch.

    `reward` is as received (the weighted sum), `score` as used after penalties, scaling and clipping. `kl` is summed
    over the response's tokens, in nats; `advantage` is their mean; `value` is that of the state before the first token.
    A number that is not finite becomes null, because JSON has no NaN.
    """
    samples = collected.rollout.samples
    kl = masked_sum(result.kls, result.mask, dim=1)
    advantages = masked_mean(result.advantages, result.mask, dim=1)
    received, used = collected.rollout.scores.tolist(), result.scores.tolist()
    kls, means, values = kl.tolist(), advantages.tolist(), result.values[:, 0].tolist()
    rows = []
    for i in indices:
        tokens = samples.response_ids[i][samples.written[i]].tolist()
        rows.append(
            {
                "step": step,
                "row": i,
                "prompt": collected.prompts[i],
                "response": collected.responses[i],
                "prompt_tokens": samples.query_ids[i][samples.query_mask[i]].tolist(),
                "response_tokens": tokens,
                "length": len(tokens),
                "finish_reason": "stop" if collected.ended[i] else "length",
                "reward": _finite(received[i]),
                "rewards": {name: _finite(each[i]) for name, each in collected.components.items()},
                "score": _finite(used[i]),
                "kl": _finite(kls[i]),
                "advantage": _finite(means[i]),
                "value": _finite(values[i]),
            }
        )
    return rows


def read_rollouts(directory: Path, files: Sequence[Path] | None = None) -> Iterator[dict[str, Any]]:
    """The records of a run's rollouts, in order, or those in some of its files. `directory` is the run's."""
    for path in rollout_files(directory) if files is None else files:
        # Not splitlines: a response may hold other line separators, such as U+2028.
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                yield json.loads(line)


def forget_rollouts_after(directory: Path, steps_done: int) -> None:
    """Remove rollouts of steps after the checkpoint, because the run repeats these steps. Raises `NotWritten`."""
    for path in reversed(rollout_files(directory)):
        lines = path.read_text(encoding="utf-8").split("\n")
        kept = [line for line in lines if line and json.loads(line)["step"] < steps_done]
        if not kept:
            with writing(path):
                path.unlink()
        elif len(kept) < len(lines) - 1:
            write_text(path, "".join(f"{line}\n" for line in kept))


def rollout_files(directory: Path) -> list[Path]:
    """The files of a run's rollouts, oldest first."""
    return sorted((directory / DIRECTORY).glob("from-step-*.jsonl"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
