"""`plaudit compare`: several runs beside each other on one page, made from what they have recorded so far."""

from pathlib import Path

from plaudit.errors import ConfigError
from plaudit.report.run_data import read_run
from plaudit.report.run_page import render_runs
from plaudit.run.storage import write_text, writing
from plaudit.settings.report import CompareConfig


def run(config: CompareConfig) -> Path:
    """Write the page of several runs. Returns its path.

    Raises:
        ConfigError: fewer than two runs are named, or a directory holds no run.
        NotWritten: the page can't be written.
    """
    if len(config.runs) < 2:
        raise ConfigError(f"{len(config.runs)} runs to compare: name the output directories of two or more")
    page = render_runs([read_run(directory) for directory in config.runs])
    with writing(config.file):
        config.file.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.file, page)
    print(f"comparison: {config.file}")
    return config.file
