"""How far a loop is: which stages of which rounds are finished, and what came of them. One file, replaced whole.

Failure modes: a finished stage is repeated, or an unfinished one is taken for finished. A stage's figures are therefore
written when it has ended, and they alone mark it as finished.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plaudit.errors import ConfigError
from plaudit.run.checkpoint import check_same_run
from plaudit.run.storage import write_text
from plaudit.settings.loop import LoopConfig
from plaudit.settings.plain import to_dict

STATE_FILE = "state.json"
ROUNDS_FILE = "rounds.jsonl"
FREE_TO_CHANGE = (
    *("output_dir", "resume", "rounds", "rank_url", "people_patience_s", "people_poll_s", "reload_patience_s"),
    *("people.batch", "people.api_key_file", "people.patience_s", "people.instructions"),
    *("reward.", "admin_key_file", "ready_timeout_s"),
    *("reward_model.allow_chance", "reward_model.checkpoint_every", "checkpoint_every", "keep_checkpoints", "device"),
)
"""Settings, or prefixes of their names, that may change when a loop goes on. `people.batch` is kept as it was."""


@dataclass
class LoopState:
    """What state.json holds."""

    directory: Path
    batch: str
    """What the batches' names begin with."""
    settings: dict[str, Any]
    finished: dict[str, dict[str, Any]]
    """Figures of each finished stage, by `round-N/STAGE`."""
    at: str = ""
    """The stage that was begun last."""

    def begin(self, stage: str) -> None:
        """Writes that this stage is under way."""
        self.at = stage
        self._write()

    def finish(self, stage: str, figures: dict[str, Any]) -> None:
        """Writes that this stage is over, and what came of it."""
        self.finished[stage] = figures
        self._write()

    def _write(self) -> None:
        record = {"batch": self.batch, "at": self.at, "finished": self.finished, "settings": self.settings}
        write_text(self.directory / STATE_FILE, json.dumps(record, indent=2, allow_nan=False) + "\n")


def open_state(config: LoopConfig) -> LoopState:
    """The state of the loop in the output directory, or that of a new one.

    Raises:
        ConfigError: there is a loop and `resume` isn't given, its settings are others, or the file can't be read.
    """
    directory, settings = config.output_dir, to_dict(config)
    path = directory / STATE_FILE
    if not path.is_file():
        return LoopState(directory, config.batch, settings, {})
    if config.resume is None:
        raise ConfigError(
            f"output_dir={directory} holds a loop; go on with --resume auto, or give another --output-dir"
        )
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        state = LoopState(directory, recorded["batch"], recorded["settings"], recorded["finished"], recorded["at"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no state of a loop ({error!r:.120}): restore it, or begin a new loop") from error
    for line in check_same_run(state.settings, settings, defaults=LoopConfig(), free=FREE_TO_CHANGE):
        print(f"going on with {line}")
    state.settings = settings
    return state


def write_rounds(directory: Path, rounds: list[dict[str, Any]]) -> None:
    """rounds.jsonl: one record a round, replaced whole."""
    write_text(directory / ROUNDS_FILE, "".join(json.dumps(record, allow_nan=False) + "\n" for record in rounds))
