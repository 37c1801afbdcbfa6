"""The metrics file survives what happens to runs: crashes, resumes, numbers that aren't."""

import inspect
import json
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from harness.machine.disks import fill, small_disk
from plaudit import cli
from plaudit.errors import ConfigError
from plaudit.run.metrics import (
    FILE_NAME,
    KL,
    REWARD_MEAN,
    RUN_NAME,
    TENSORBOARD_DIR,
    MetricsLog,
    open_tracker,
    read_metrics,
)
from plaudit.run.storage import NotWritten


def test_each_step_can_be_read_while_the_run_goes_on(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, {REWARD_MEAN: 0.5, KL: 0.0})
        assert read_metrics(tmp_path / FILE_NAME) == [{"step": 0, REWARD_MEAN: 0.5, KL: 0.0}]


def test_a_resumed_run_appends_and_the_last_record_of_a_repeated_step_counts(tmp_path):
    for first, reward in ((0, 1.0), (2, 5.0)):
        with MetricsLog(tmp_path, tensorboard=False) as log:
            for step in range(first, first + 4):
                log.write(step, {REWARD_MEAN: reward})
    assert [row[REWARD_MEAN] for row in read_metrics(tmp_path / FILE_NAME)] == [1.0, 1.0, 5.0, 5.0, 5.0, 5.0]


def test_a_line_cut_off_by_a_crash_costs_that_line_alone(tmp_path):
    path = tmp_path / FILE_NAME
    path.write_text('{"step": 0, "a": 1.0}\n{"step": 1, "a": 2.')
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(2, {"a": 3.0})
    assert read_metrics(path) == [{"step": 0, "a": 1.0}, {"step": 2, "a": 3.0}]


def test_a_full_disk_is_told_with_the_files_name_and_costs_the_line_that_found_no_room(tmp_path):
    with small_disk(tmp_path / "disk", 1024) as disk:
        path = disk / FILE_NAME
        with MetricsLog(disk, tensorboard=False) as log:
            log.write(0, {"a": 1.0})
            filler = fill(disk)
            too_long = {f"{'long' * 10}{i}": 2.0 for i in range(200)}
            with pytest.raises(NotWritten, match=rf"cannot write {path}: No space left on device; .*make room"):
                log.write(1, too_long)
            filler.unlink()
        with MetricsLog(disk, tensorboard=False) as log:
            log.write(2, {"a": 3.0})
        assert [record["step"] for record in read_metrics(path)] == [0, 2]


def test_a_disk_too_full_for_a_sample_table_is_told_in_the_step_that_wrote_it_and_once(tmp_path, monkeypatch, capsys):
    # TensorBoard writes in a thread of its own, and raises in its next call what that failed with.
    monkeypatch.setattr(threading, "excepthook", cli.print_unless_of_tensorboard)
    with small_disk(tmp_path / "disk", 1024) as disk:
        log = MetricsLog(disk)
        fill(disk)
        with pytest.raises(NotWritten, match=rf"cannot write {disk / TENSORBOARD_DIR}: No space left on device"):
            log.write_samples(0, [("prompt", "response " * 5000, 1.0)])
        with pytest.raises(NotWritten):
            log.close()
    assert "Traceback" not in capsys.readouterr().err
    other = threading.Thread(target=json.loads, args=["{"])
    other.start()
    other.join()
    assert "JSONDecodeError" in capsys.readouterr().err, "what another thread fails with is shown"


def test_a_number_that_is_not_finite_is_null_in_the_file_and_missing_when_read(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, {"a": math.nan, "b": math.inf, "c": 1})
    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 0, "a": None, "b": None, "c": 1.0}
    assert read_metrics(tmp_path / FILE_NAME) == [{"step": 0, "c": 1.0}]


def test_a_metrics_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.jsonl: cannot read the metrics"):
        read_metrics(tmp_path / "nope.jsonl")


def test_tensorboard_shows_the_same_numbers_and_hides_what_a_resumed_run_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        for step in range(4):
            log.write(step, {KL: float(step)})
    with MetricsLog(tmp_path, resume_from=2) as log:
        log.write(2, {KL: 20.0})
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars(KL)] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_sampled_responses_cannot_break_their_table_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.write_samples(3, [("One", " a | b\nc <i>", 0.5), ("Two", "d", -1.0)])
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| prompt | response | reward |",
        "| --- | --- | ---: |",
        "| One | a &#124; b c &lt;i&gt; | 0.500 |",
        "| Two | d | -1.000 |",
    ]


class Notebook(GeneralTracker):
    """A tracker that writes everything into a list."""

    name = "notebook"
    requires_logging_directory = False
    pages: ClassVar[list[Any]] = []

    def __init__(self, run_name: str) -> None:
        self.pages.append(run_name)

    def start(self) -> None:
        self.pages.append("started")

    @property
    def tracker(self) -> list[Any]:
        return self.pages

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.pages.append(values)

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        self.pages.append((step, values))

    def log_table(self, table_name: str, *, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.pages.append((step, table_name, columns, data))

    def finish(self) -> None:
        self.pages.append("finished")


def test_a_tracker_of_accelerates_sees_settings_metrics_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "pages", [])
    tracker = open_tracker("notebook", tmp_path, {"seed": 1})
    with MetricsLog(tmp_path, tensorboard=False, trackers=[tracker]) as log:
        log.write(0, {"objective/kl": 0.5})
        log.write_samples(0, [("a", "b", 1.5)])
    assert Notebook.pages == [
        "plaudit",
        "started",
        {"seed": 1},
        (0, {"objective/kl": 0.5}),
        (0, "samples", ["prompt", "response", "reward"], [["a", "b", 1.5]]),
        "finished",
    ]


def test_project_and_run_are_named_as_wandb_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = types.ModuleType("wandb")
    started: list[dict[str, Any]] = []
    wandb.init = lambda **options: started.append(options)  # type: ignore[attr-defined]
    wandb.config = types.SimpleNamespace(update=lambda values, allow_val_change: None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as in a run of one process
    open_tracker("wandb", tmp_path, {"seed": 1}, project="reviews", run="first try")
    open_tracker("wandb", tmp_path, {"seed": 1})
    assert started == [{"project": "reviews", "name": "first try"}, {"project": "plaudit"}]


@pytest.mark.parametrize("name", sorted(RUN_NAME))
def test_every_tracker_takes_the_name_of_a_run_by_this_parameter(name: str) -> None:
    kind = LOGGER_TYPE_TO_CLASS[name]
    parameters = inspect.signature(kind.__init__).parameters
    assert RUN_NAME[name] in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_a_run_name_for_a_tracker_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tracker_run='a': aim takes none"):
        open_tracker("aim", tmp_path, {}, run="a")


def test_a_tracker_that_does_not_exist_or_is_not_installed_is_a_setting_to_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"trackers='notebok': there are aim, .*wandb"):
        open_tracker("notebok", tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="trackers='wandb' needs its package: pip install wandb"):
        open_tracker("wandb", tmp_path, {})
