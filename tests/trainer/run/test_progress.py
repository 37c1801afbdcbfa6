"""What a person sees of a run."""

import sys
import time

import pytest

from plaudit.run.metrics import KL, REWARD_MEAN
from plaudit.run.progress import Counting, StepProgress, WaitingLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_wait_is_told_at_once_then_now_and_then_and_so_is_its_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = WaitingLine()
    for second in range(25):
        clock[0] = 1000.0 + second
        shown(f"waiting since {second} s")
    shown("")
    shown("waiting again")
    assert capsys.readouterr().err.splitlines() == [
        "waiting since 0 s",
        "waiting since 10 s",
        "waiting since 20 s",
        "the reward is there",
        "waiting again",
    ]


def as_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_on_a_terminal_a_wait_is_one_line_that_changes_and_is_gone_afterwards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_terminal(monkeypatch)
    with WaitingLine() as waiting:
        for left in range(100, 0, -1):
            waiting(f"waiting for [a] reward, for {left} s more")
        waiting("")
    err = capsys.readouterr().err
    assert "waiting for [a] reward, for 1" in err
    assert err.count("\n") < 5


def test_on_a_terminal_a_wait_before_the_first_step_is_told_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_terminal(monkeypatch)
    with WaitingLine() as line:
        StepProgress(10, 0, line).waiting("waiting for a reward")
    assert "waiting for a reward" in capsys.readouterr().err


def test_what_is_waited_for_stands_whole_below_the_bar_and_is_gone_afterwards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    shown = StepProgress(10, 0, WaitingLine())
    what = "waiting for a reward, for 600 s more: http://127.0.0.1:8000: connection failed"
    with shown.showing():
        shown.step({"time/samples_per_second": 9.0, REWARD_MEAN: 1.5, KL: 0.25})
        capsys.readouterr()
        shown.waiting(what)
        bar, below = capsys.readouterr().err.split("\n")[:2]
        assert "reward +1.50  KL 0.25" in bar
        assert below == what
        shown.waiting("")
        assert what not in capsys.readouterr().err


def test_things_are_counted_in_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Counting("rankings", total=40, done=5) as counting:
        for second in range(25):
            clock[0] = 1000.0 + second
            counting.add()
        clock[0] = 1030.0
        counting.waiting("waiting for people")
    assert capsys.readouterr().err.splitlines() == ["16/40 rankings", "26/40 rankings", "waiting for people"]


def test_without_a_total_the_count_alone_is_told(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Counting("rankings") as counting:
        clock[0] = 1010.0
        counting.add(3)
    assert capsys.readouterr().err == "3 rankings\n"


def test_on_a_terminal_the_count_is_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_terminal(monkeypatch)
    with Counting("rankings", total=4) as counting:
        counting.waiting("waiting for people")
        counting.add(4)
    assert "rankings" in capsys.readouterr().err
