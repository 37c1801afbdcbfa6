"""`plaudit size` as users run it: from a run, from numbers, and with what it can't use."""

import json
from pathlib import Path

import pytest

from plaudit import cli

RUN = Path(__file__).parents[3] / "benchmarks" / "fleet" / "results" / "demo-run"


def test_the_demos_run_is_sized(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    curve = tmp_path / "curve.html"
    assert cli.run(["size", str(RUN), "--trainers", "10", "--curve", str(curve)]) == 0
    said = capsys.readouterr().out
    assert "4 requests a step, 128 texts" in said
    assert "--scale reward=" in said
    assert "averageValue" in said
    assert "<svg" in curve.read_text()


def test_a_number_of_replicas_is_judged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps({"table": [[0, 0.1], [1000, 0.1]]}))
    numbers = ["--step-s", "10", "--texts-per-step", "32", "--tokens-per-text", "20"]
    assert cli.run(["size", *numbers, "--judge", str(times), "--replicas", "1"]) == 0
    assert "1 replica: trainers wait 0.0% of their time (0.00 s a step), 3 texts/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name a run's directory"),
        (["nowhere"], "has no metrics.jsonl"),
        ([str(RUN), "--judge", "unheard-of"], "neither a file nor one of imdb-distilbert-mini"),
        ([str(RUN), "--wait", "2"], "wait=2.0 must lie between 0 and 1"),
        ([str(RUN), "--curve", "curve.pdf"], "must end with .svg or .html"),
        ([str(RUN), "--trainers", "0"], "trainers=0 must be greater than 0"),
    ],
)
def test_what_can_not_be_used_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert cli.run(["size", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_holds_no_times_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text("[]")
    assert cli.run(["size", str(RUN), "--judge", str(times)]) == 2
    assert "is no file of service times" in capsys.readouterr().err
