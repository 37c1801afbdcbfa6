"""The GPU benchmark with tiny sizes on the CPU: all of its code runs, and whatever ends it leaves what was done."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import render, run
from harness.processes import until

ROOT = Path(__file__).parents[2]
MARK = "PLAUDIT_GPU_BENCHMARK"
MOST_FILES = 8


class Started:
    """`benchmarks.gpu.run` in a process; all processes that come of it carry a mark."""

    def __init__(self, out: Path, *flags: str) -> None:
        self.out, self._mark = out, uuid.uuid4().hex
        environment = os.environ | {MARK: self._mark, "PYTHONPATH": f"{ROOT}:{ROOT}/services:{ROOT}/trainer"}
        command = [sys.executable, "-m", "benchmarks.gpu.run", "--out", str(out), "--tiny", "--device", "cpu", *flags]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def result(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / f"{part}.json").read_text())
        return found

    def left_over(self) -> list[int]:
        """Processes that run on."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tmp_path_factory.mktemp("whole"))
    started.process.communicate(timeout=280)
    assert started.process.returncode == 0
    yield started
    assert started.left_over() == []


@pytest.mark.parametrize("part", run.PARTS)
def test_every_part_ends_and_no_check_fails(whole: Started, part: str) -> None:
    found = whole.result(part)
    assert found["state"] == "done"
    assert found["sections"]
    for section, rows in found["sections"].items():
        # A model that can't be recorded says why; whether it can is another test's business.
        failed = [row for row in rows if "error" in row and section != "capture"]
        assert failed == [], section
        assert all(row.get("errors", 0) == 0 for row in rows), section


def test_there_are_few_result_files_and_one_of_them_says_what_ran_where(whole: Started) -> None:
    assert len(list(whole.out.iterdir())) <= MOST_FILES
    machine = whole.result("machine")["sections"]
    assert machine["machine"][0]["torch"]
    assert [row["part"] for row in machine["parts"]] == list(run.PARTS)


def test_the_epoch_tells_training_from_start_up(whole: Started) -> None:
    (row, *_) = whole.result("epoch")["sections"]["epoch"]
    assert row["steps"] == 8
    assert row["start_s"] > 0
    assert row["training_s"] > 0


def test_tables_name_versions_and_hold_every_part(whole: Started) -> None:
    text = render.render(whole.out)
    assert text.splitlines()[0].startswith("no GPU: a rehearsal on the CPU, torch ")
    assert all(f"### {title}\n" in text for title in render.TITLES.values())
    document = render.between_marks((ROOT / "docs" / "evidence" / "gpu.md").read_text(), text)
    assert render.between_marks(document, text) == document


def test_a_run_that_is_stopped_leaves_the_finished_parts_and_no_process(tmp_path: Path) -> None:
    started = Started(tmp_path, "--only", "two", "service")
    until((tmp_path / "service.json").exists, "the second part")
    # Its servers take longer than that to start.
    until(lambda: len(started.left_over()) > 3, "the servers")
    started.process.send_signal(signal.SIGTERM)
    started.process.communicate(timeout=60)
    assert started.process.returncode == 128 + signal.SIGTERM
    assert started.left_over() == []
    assert started.result("service")["state"] == "cut short"
    assert json.loads((tmp_path / "machine.json").read_text())["sections"]["machine"]


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    started = Started(tmp_path, "--only", "where", "two", "--limit-factor", "0.02")
    started.process.communicate(timeout=100)
    states = {row["part"]: row["state"] for row in started.result("machine")["sections"]["parts"]}
    assert states.keys() == {"where", "two"}
    assert states["where"] in ("cut short", "short of time")
    assert started.left_over() == []
