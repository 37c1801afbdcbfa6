"""What a run has recorded, read from its directory, also while the run goes on.

Failure mode: a record of one step is taken for another's. `step` of metrics and rollouts is the index of a step from 0;
`step` of evaluations is the number of steps done. Here, `x` of both is the number of steps done.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigError
from plaudit.report.audit import audit
from plaudit.run.evaluations import PREFIX, best_of, read_answers, read_evaluations, reason_to_stop
from plaudit.run.metrics import FILE_NAME, read_metrics
from plaudit.run.rollouts import read_rollouts, rollout_files
from plaudit.settings.watch import WatchSettings

SETTINGS_FILE = "run.json"
MOST_BYTES = 64 * 2**20
"""Of rollouts read for a page. Of more, files at even distances are read."""


@dataclass(frozen=True)
class RunData:
    """The records of one run."""

    name: str
    settings: Mapping[str, Any]
    """As in run.json."""
    metrics: Sequence[Mapping[str, float]]
    evaluations: Sequence[Mapping[str, float]]
    answers: Mapping[int, Sequence[Mapping[str, Any]]]
    """Held-out answers by the number of steps done."""
    rollouts: Sequence[Mapping[str, Any]]
    """Without their tokens; not all of them if there are many."""

    @property
    def judges(self) -> list[str]:
        """Names of the further judges, from the newest evaluation."""
        record = self.evaluations[-1] if self.evaluations else {}
        named = [name for name in record if name.endswith("/win_rate") and name != f"{PREFIX}win_rate"]
        return [name.removeprefix(PREFIX).removesuffix("/win_rate") for name in named]

    @property
    def watch(self) -> WatchSettings:
        """The settings that say which evaluation is the best and when the run stops."""
        known = {f.name for f in dataclasses.fields(WatchSettings)} - {"judges", "best_by"}
        saved = self.settings.get("watch", {})
        values = {name: value for name, value in saved.items() if name in known}
        watch = WatchSettings(**values)
        # A figure of a judge is only checked where the judges are known.
        object.__setattr__(watch, "best_by", saved.get("best_by", watch.best_by))
        return watch

    @property
    def best(self) -> Mapping[str, float] | None:
        """The best evaluation; None if there is none."""
        named = [record for record in self.evaluations if PREFIX + self.watch.best_by in record]
        return best_of(named, self.watch)

    @property
    def ended_early(self) -> str | None:
        """Why the run ended early; None if it did not."""
        return reason_to_stop(self.evaluations, self.watch) if self.evaluations else None

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """A metric of the training by the number of steps done: x and y."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] + 1 for row in rows], [row[name] for row in rows]

    def held_out(self, name: str) -> tuple[list[float], list[float]]:
        """A held-out figure by the number of steps done: x and y."""
        rows = [row for row in self.evaluations if PREFIX + name in row]
        return [row["step"] for row in rows], [row[PREFIX + name] for row in rows]

    def audits(self) -> dict[int, dict[str, float]]:
        """The audit's figures by the number of steps done: of the held-out answers, else of the rollouts."""
        if self.answers:
            return {step: audit_of(rows, "judges") for step, rows in self.answers.items()}
        by_step: dict[int, list[Mapping[str, Any]]] = {}
        for row in self.rollouts:
            by_step.setdefault(row["step"] + 1, []).append(row)
        return {step: audit_of(rows, None) for step, rows in by_step.items()}


def _some_rollouts(directory: Path) -> list[dict[str, Any]]:
    files = rollout_files(directory)
    size = sum(file.stat().st_size for file in files)
    every = max(1, -(-size // MOST_BYTES))
    return [
        {name: value for name, value in row.items() if not name.endswith("_tokens")}
        for row in read_rollouts(directory, files[::every])
    ]


def audit_of(rows: Sequence[Mapping[str, Any]], judges: str | None) -> dict[str, float]:
    """The audit's figures of answers or rollouts as they are on disk. Rows with a number that is not finite are left
    out."""
    rows = [row for row in rows if row["reward"] is not None and row["kl"] is not None]
    if not rows:
        return {}
    names = rows[0][judges] if judges else ()
    return audit(
        [row["response"] for row in rows],
        rewards=[row["reward"] for row in rows],
        lengths=[row["length"] for row in rows],
        kls=[row["kl"] for row in rows],
        judged={name: [row["judges"][name] for row in rows] for name in names},
    )


def read_run(directory: Path) -> RunData:
    """The records in a run's directory.

    Raises:
        ConfigError: there is no run, or its files can't be read.
    """
    if not (directory / FILE_NAME).is_file() and not (directory / SETTINGS_FILE).is_file():
        raise ConfigError(f"{directory} holds no run: name the output directory of `plaudit ppo`")
    try:
        file = directory / SETTINGS_FILE
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        metrics = read_metrics(directory / FILE_NAME) if (directory / FILE_NAME).is_file() else []
        evaluations = read_evaluations(directory)
        answers = {int(record["step"]): read_answers(directory, int(record["step"])) for record in evaluations}
        return RunData(
            name=str(directory),
            settings=settings,
            metrics=metrics,
            evaluations=evaluations,
            answers={step: rows for step, rows in answers.items() if rows},
            rollouts=_some_rollouts(directory),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{directory}: its records can't be read: {error}") from error
