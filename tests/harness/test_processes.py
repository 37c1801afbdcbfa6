"""What starts and ends other programs leaves none behind, and says why one ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.processes import Program, running

ROOT = Path(__file__).parents[2]
SAYS_TWO_LINES_AND_ENDS = """
print('{"event": "ready"}')
print("last")
raise SystemExit(3)
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
signal.pause()
"""


def python(code: str) -> Program:
    return Program(sys.executable, "-c", code)


def test_lines_are_read_one_by_one_and_what_was_said_last_after_the_end_too() -> None:
    with python(SAYS_TWO_LINES_AND_ENDS) as program:
        program.begin()
        assert program.wait_for_event("ready") == {"event": "ready"}
        assert program.wait() == 3
        assert program.next_line() == "last"
        assert not program.running


def test_a_program_that_ends_too_early_is_named_with_its_exit_code() -> None:
    with python("raise SystemExit(7)") as program:
        program.begin()
        with pytest.raises(AssertionError, match=r"SystemExit\(7\) ended with 7 before it said more"):
            program.next_line()


def test_a_program_that_ends_while_something_is_waited_for_shows_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        running(sys.executable, "-c", "raise SystemExit('no such model')", log=log) as program,
        pytest.raises(AssertionError, match=r"(?s)ended with 1 before the port opened.*no such model"),
    ):
        program.until(lambda: False, "the port opened")


def test_silence_is_bounded() -> None:
    with python("import signal; signal.pause()") as program:
        program.begin()
        with pytest.raises(AssertionError, match=r"said nothing more for 0\.2 s"):
            program.next_line(wait_s=0.2)


def test_one_that_does_not_end_is_killed_and_that_is_a_failure() -> None:
    program = python(STUBBORN)
    program.begin()
    assert program.next_line() == "ready"
    process = psutil.Process(program.pid)
    program.send_signal(signal.SIGTERM)
    with pytest.raises(AssertionError, match=r"did not end within 0\.2 s"):
        program.wait(0.2)
    assert not process.is_running()


def test_it_runs_again_after_its_end() -> None:
    with python("print('ready', flush=True)\nimport signal; signal.pause()") as program:
        for _ in range(2):
            program.begin()
            assert program.next_line() == "ready"
            assert program.kill() == -signal.SIGKILL


def test_no_program_outlives_the_interpreter_that_began_it() -> None:
    code = (
        "from harness.processes import Program\n"
        "program = Program('sleep', '600')\n"
        "program.begin()\n"
        "print(program.pid)\n"
        "raise SystemExit('without an end')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "without an end" in done.stderr
    assert not psutil.pid_exists(int(done.stdout))
