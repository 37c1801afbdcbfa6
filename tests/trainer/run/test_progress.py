"""What a person sees of a run."""

import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

from plaudit.run.live import RATE, notebook_display, sparkline
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
        bar, below, figures = capsys.readouterr().err.split("\n")[:3]
        assert "9 samples/s" in bar
        assert below == what
        assert "reward +1.50  KL 0.25" in figures
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


STEP = {
    RATE: 9.0,
    REWARD_MEAN: 1.5,
    KL: 0.25,
    "tokens/responses_len_mean": 12.0,
    "objective/entropy": 40.0,
    "ppo/policy/clipfrac": 0.125,
}


def test_a_line_has_the_figures_and_the_time_that_is_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = StepProgress(4, 0, WaitingLine())
    for _ in range(4):
        clock[0] += 90
        shown.step(STEP)
    lines = capsys.readouterr().err.splitlines()
    figures = "reward +1.50  KL 0.25  length 12.0  entropy 40.0  clip fraction 0.125  9 samples/s"
    assert lines[0] == f"PPO step 1/4  {figures}  0:04:30 left"
    assert lines[3] == f"PPO step 4/4  {figures}"


def test_on_a_terminal_the_figures_stand_below_the_bar_with_their_course(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", "90")
    shown = StepProgress(10, 0, WaitingLine())
    with shown.showing():
        for reward in (0.0, 0.5, 1.0):
            shown.step(STEP | {REWARD_MEAN: reward})
    last = capsys.readouterr().err.split("PPO")[-1]
    assert "3/10" in last
    assert "clip fraction 0.125" in last
    assert "▁▅█" in last


def test_a_spark_line_by_hand() -> None:
    assert sparkline([0, 7, 3.5, 1], width=9) == "▁█▅▂"
    assert sparkline([9, 0, 7], width=2) == "▁█"
    assert sparkline([3, 3], width=5) == "▁▁"


def test_in_a_notebook_one_output_is_updated(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, str]] = []

    class Handle:
        def update(self, content: SimpleNamespace) -> None:
            shown.append(("update", content.data))

    def display(content: SimpleNamespace, *, display_id: bool) -> Handle:
        shown.append(("new", content.data))
        return Handle()

    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    parts = ModuleType("IPython.display")
    parts.display, parts.HTML = display, lambda data: SimpleNamespace(data=data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    progress = StepProgress(3, 0, WaitingLine())
    with progress.showing():
        progress.step(STEP)
        progress.step(STEP)  # within the same second
        clock[0] += 2
        progress.waiting("waiting for <the> reward")
        progress.step(STEP)
    assert [kind for kind, _ in shown] == ["new", "update", "update", "update"]
    assert "&lt;the&gt;" in shown[2][1]
    assert "PPO step 3 of 3" in shown[3][1]
    assert "clip fraction <b>0.125</b>" in shown[3][1]
    assert capsys.readouterr().err == ""


def test_a_terminals_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = ModuleType("IPython")
    shell.get_ipython = lambda: SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    assert notebook_display() is None
    monkeypatch.delitem(sys.modules, "IPython")
    assert notebook_display() is None
