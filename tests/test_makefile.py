"""The Makefile's targets, in a checkout that has no environment yet."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = [
    "check",
    "format-check",
    "lint",
    "types",
    "workflows",
    "docs",
    "test",
    "coverage",
    "parts-test",
    "compose-test",
    "demo",
]


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_makes_the_environment_before_it_uses_it(target: str, tmp_path: Path) -> None:
    """Continuous integration calls some targets alone on a clean checkout."""
    command = ["make", "--dry-run", f"VENV={tmp_path}", target]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    lines = [line for line in printed.stdout.splitlines() if not line.startswith("make")]
    assert lines[0].endswith(f"-m venv {tmp_path}"), lines[0]
    assert lines[1].startswith(f"{tmp_path}/bin/pip install"), lines[1]
