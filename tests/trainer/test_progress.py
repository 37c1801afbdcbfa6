"""What a person sees of a run that is not on a terminal."""

import pytest

from trainer import progress
from trainer.progress import StepProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_wait_is_told_at_once_then_now_and_then_and_so_is_its_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = StepProgress(total=10, done=0)
    for second in range(25):
        clock[0] = 1000.0 + second
        shown.waiting(f"waiting since {second} s")
    shown.waiting("")
    shown.waiting("waiting again")
    assert capsys.readouterr().err.splitlines() == [
        "waiting since 0 s",
        "waiting since 10 s",
        "waiting since 20 s",
        "the reward is there",
        "waiting again",
    ]


def test_on_a_terminal_a_wait_before_the_first_step_is_told_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    StepProgress(total=10, done=0).waiting("waiting for a reward")
    assert "waiting for a reward" in capsys.readouterr().err
