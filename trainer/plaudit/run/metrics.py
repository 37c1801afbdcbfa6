"""Metrics of a run: one flat dict per step, to metrics.jsonl and trackers. Names are those of the classic trainer.

Failure modes: a line cut off by a crash makes the rest unreadable; a step that a resumed run repeats counts twice.
"""

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from plaudit.errors import ConfigError
from plaudit.run.storage import write_text, writing

FILE_NAME = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

REWARD_MEAN = "env/reward_mean"
"""Mean score of the step's responses, as received from the reward service."""
REWARD_STD = "env/reward_std"
REWARD_COMPONENT = "rewards/{name}/{statistic}"
"""Mean and standard deviation of one of several rewards, before its weight. Other trainers use the same names."""
ENDED_SHARE = "response/ended_share"
"""Share of the responses that ended with an end token or a stop string."""
KL = "objective/kl"
"""Mean over responses of the summed KL to the reference, in nats."""
KL_COEF = "objective/kl_coef"


class MetricsLog:
    """Appends each step to `directory/metrics.jsonl`, flushed at once, and to `directory/tensorboard`.

    A resumed run passes its first step as `resume_from`. TensorBoard then hides later steps of earlier processes, as
    `read_metrics` does. `trackers` are additional ones (`open_tracker`).
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_from: int | None = None,
        tensorboard: bool = True,
        trackers: Sequence[Any] = (),
    ) -> None:
        self._directory, self._path = directory, directory / FILE_NAME
        self._trackers = trackers
        self._tensorboard: Any = None
        with writing(self._path):
            directory.mkdir(parents=True, exist_ok=True)
            torn = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")
            # Unbuffered, so that a line that failed to be written is not retried when the file is closed.
            self._file = self._path.open("ab", buffering=0)
            if torn:
                self._append("\n", self._file)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with writing(directory / TENSORBOARD_DIR):
                self._tensorboard = SummaryWriter(str(directory / TENSORBOARD_DIR), purge_step=resume_from)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics. Non-finite numbers become null, because JSON has no NaN. Raises `NotWritten`."""
        numbers = {name: float(value) for name, value in metrics.items()}
        record = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with writing(self._path):
            self._append(json.dumps({"step": step, **record}, allow_nan=False) + "\n", self._file)
        self._log_numbers(step, numbers)

    def _log_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            with writing(self._directory / TENSORBOARD_DIR):
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
                self._tensorboard.flush()
        for tracker in self._trackers:
            tracker.log(dict(numbers), step=step)

    def write_evaluation(self, path: Path, step: int, record: Mapping[str, float]) -> None:
        """Append one evaluation, after `step` steps, to the file `path`, and write it to TensorBoard and trackers."""
        with writing(path), path.open("ab", buffering=0) as file:
            self._append(json.dumps(dict(record), allow_nan=False) + "\n", file)
        self._log_numbers(step, {name: value for name, value in record.items() if name != "step"})

    def write_samples(
        self,
        step: int,
        samples: Sequence[tuple[str, str, float]],
        fields: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Write some of the step's (prompt, response, reward) as a table, to TensorBoard and to trackers.

        `fields` are additional columns with one value per sample.
        """
        names = ["prompt", "response", "reward", *(fields or {})]
        further = [_texts(values) for values in (fields or {}).values()]
        for tracker in self._trackers:
            if hasattr(tracker, "log_table"):
                rows = [[*sample, *more] for sample, *more in zip(samples, *further, strict=True)]
                tracker.log_table("samples", columns=names, data=rows, step=step)
        if self._tensorboard is None:
            return
        lines = [
            " ".join(f"| {cell}" for cell in (_cell(prompt), _cell(response), f"{reward:.3f}", *map(_cell, more)))
            + " |"
            for (prompt, response, reward), *more in zip(samples, *further, strict=True)
        ]
        ruler = f"| --- | --- | ---: |{' --- |' * len(further)}"
        table = "\n".join([f"| {' | '.join(map(_cell, names))} |", ruler, *lines])
        with writing(self._directory / TENSORBOARD_DIR):
            self._tensorboard.add_text("samples", table, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Close the file, TensorBoard and the trackers. Raises `NotWritten`."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
        if self._tensorboard is not None:
            with writing(self._directory / TENSORBOARD_DIR):
                self._tensorboard.close()

    @staticmethod
    def _append(line: str, file: io.FileIO) -> None:
        data = line.encode()
        while data:
            data = data[file.write(data) :]

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
    "mlflow": "run_name",
}
"""The trackers that take a name for the run, and how each calls it."""


def open_tracker(
    name: str, directory: Path, config: Mapping[str, Any], *, project: str = "plaudit", run: str | None = None
) -> Any:
    """Start one of accelerate's trackers and log the run's settings. Its local files go to `directory`.

    Raises:
        ConfigError: the name is unknown, the tracker's package is not installed, or it takes no name for a run.
    """
    from accelerate import PartialState, tracking

    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"trackers={name!r}: there are {', '.join(sorted(tracking.LOGGER_TYPE_TO_CLASS))}")
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    options = {"logging_dir": str(directory)} if kind.requires_logging_directory else {}
    if run is not None:
        if name not in RUN_NAME:
            raise ConfigError(f"tracker_run={run!r}: {name} takes none; these do: {', '.join(RUN_NAME)}")
        options[RUN_NAME[name]] = run
    PartialState()  # the trackers log through it, and a run of one process hasn't started it
    try:
        tracker = kind(project, **options)
        tracker.start()
    except ImportError as error:
        raise ConfigError(f"trackers={name!r} needs its package: pip install {error.name or name}") from error
    tracker.store_init_configuration(dict(config))
    return tracker


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The steps of a metrics.jsonl in order. For a step that a resumed run repeated, the last record counts.

    Skips incomplete lines, and leaves out non-finite numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the metrics: {error.strerror}") from error
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            steps[record["step"]] = {name: value for name, value in record.items() if value is not None}
    return [steps[step] for step in sorted(steps)]


def _texts(values: Sequence[Any]) -> list[str]:
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]


def _cell(text: str) -> str:
    """Text escaped for one cell of a Markdown table."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;")


def forget_steps_after(path: Path, steps_done: int) -> None:
    """Remove metrics of steps after the checkpoint, because the run repeats these steps."""
    if not path.exists():
        return
    kept = [json.dumps(record) for record in read_metrics(path) if record["step"] < steps_done]
    write_text(path, "".join(f"{line}\n" for line in kept))
