"""`plaudit report`: the page of one run, made from what it has recorded so far."""

from pathlib import Path

from plaudit.report.run_data import read_run
from plaudit.report.run_page import render_run
from plaudit.run.storage import write_text
from plaudit.settings.report import ReportConfig

FILE_NAME = "training.html"


def run(config: ReportConfig) -> Path:
    """Write the page. Returns its path.

    Raises:
        ConfigError: the directory holds no run.
        NotWritten: the page can't be written.
    """
    file = config.file or config.run / FILE_NAME
    write_text(file, render_run(read_run(config.run)))
    print(f"report: {file}")
    return file
