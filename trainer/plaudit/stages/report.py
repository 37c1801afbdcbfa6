"""`plaudit report` and `plaudit compare`: pages of runs, made from what the runs have recorded so far."""

from pathlib import Path

from plaudit.errors import ConfigError
from plaudit.report.run_data import read_run
from plaudit.report.run_page import render_run, render_runs
from plaudit.run.storage import write_text, writing
from plaudit.settings.report import CompareConfig, ReportConfig

FILE_NAME = "training.html"


def run(config: ReportConfig | CompareConfig) -> Path:
    """Write the page of one run, or of several beside each other. Returns its path.

    Raises:
        ConfigError: a directory holds no run, or there are fewer than two runs to compare.
        NotWritten: the page can't be written.
    """
    if isinstance(config, ReportConfig):
        file, page = config.file or config.run / FILE_NAME, render_run(read_run(config.run))
    else:
        if len(config.runs) < 2:
            raise ConfigError(f"{len(config.runs)} runs to compare: name the output directories of two or more")
        file, page = config.file, render_runs([read_run(directory) for directory in config.runs])
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    print(f"report: {file}")
    return file
