"""The held-out evaluations of a run: one flat record each in evaluations.jsonl, and the answers in held-out/.

`step` is the number of steps done, as in the names of checkpoints. Everything that a resumed run needs to know about
earlier evaluations is in the records: the best one so far, and whether the run must stop.

Failure mode: a resumed run counts an evaluation twice, or forgets one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit import atomic
from plaudit.run.checkpoint import MANIFEST, read_checkpoint
from plaudit.run.metrics import forget_steps_after, read_metrics
from plaudit.run.storage import write_text, writing
from plaudit.settings.watch import WatchSettings

FILE_NAME = "evaluations.jsonl"
ANSWERS = "held-out"
BEST = "best"
PREFIX = "eval/"

Record = Mapping[str, float]


def read_evaluations(directory: Path) -> list[dict[str, float]]:
    """The records of the run in `directory`, in order; none if it has no evaluations."""
    path = directory / FILE_NAME
    return read_metrics(path) if path.is_file() else []


def read_answers(directory: Path, step: int) -> list[dict[str, Any]]:
    """The held-out answers after `step` steps, one record per prompt; none if they are not there."""
    path = _answers_file(directory, step)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_answers(directory: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the held-out answers after `step` steps. Raises `NotWritten`."""
    path = _answers_file(directory, step)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def forget_evaluations_after(directory: Path, steps_done: int) -> list[Path]:
    """Remove evaluations after the checkpoint, because the run repeats them. Returns what else was dropped.

    A best checkpoint of a later step is removed too: the run reaches it again.
    """
    forget_steps_after(directory / FILE_NAME, steps_done + 1)
    recorded = {record["step"] for record in read_evaluations(directory)}
    for path in (directory / ANSWERS).glob("step-*.jsonl"):
        if int(path.stem.removeprefix("step-")) not in recorded:
            with writing(path):
                path.unlink()
    best = directory / BEST
    if (best / MANIFEST).is_file() and read_checkpoint(best).step > steps_done:
        atomic.remove_directory(best, marker=MANIFEST)
        return [best]
    return []


def best_of(records: Sequence[Record], settings: WatchSettings) -> Record | None:
    """The record with the highest figure named by `best_by`, the earliest of equal ones; None if there is none."""
    return max(records, key=lambda record: record[PREFIX + settings.best_by], default=None)


def reason_to_stop(records: Sequence[Record], settings: WatchSettings) -> str | None:
    """Why the run ends after its newest evaluation, in words; None if it goes on."""
    if not records:
        return None
    last, name = records[-1], settings.best_by
    step, kl, value = last["step"], last[PREFIX + "kl"], last[PREFIX + name]
    if settings.stop_kl is not None and kl > settings.stop_kl:
        return f"after step {step}, the held-out KL is {kl:.2f} nats, more than watch.stop_kl={settings.stop_kl:g}"
    if settings.stop_target is not None and value >= settings.stop_target:
        target = f"watch.stop_target={settings.stop_target:g}"
        return f"after step {step}, the held-out {name} is {value:.3f}, which reaches {target}"
    best = best_of(records, settings)
    assert best is not None
    since = sum(record["step"] > best["step"] for record in records)
    if settings.stop_patience is not None and since >= settings.stop_patience:
        return (
            f"after step {step}, no new best held-out {name} in {since} evaluations (watch.stop_patience="
            f"{settings.stop_patience}); the best is {best[PREFIX + name]:.3f} after step {best['step']}"
        )
    return None


def _answers_file(directory: Path, step: int) -> Path:
    return directory / ANSWERS / f"step-{step:06d}.jsonl"
