"""The live figures of a PPO run: a line for a log, a table for a terminal, HTML for a notebook."""

import html
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.table import Table
from rich.text import Text

from plaudit.run.metrics import KL, REWARD_MEAN

FIGURES = (
    ("reward", REWARD_MEAN, "+.2f"),
    ("KL", KL, ".2f"),
    ("length", "tokens/responses_len_mean", ".1f"),
    ("entropy", "objective/entropy", ".1f"),
    ("clip fraction", "ppo/policy/clipfrac", ".3f"),
)
"""What is shown: its name for people, the metric, and the format."""
RATE = "time/samples_per_second"
BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_STEPS = 32
RECENT_STEPS = 20
"""The time that is left is estimated from so many steps."""


class LiveFigures:
    """The newest figures of a run, and their recent history."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._history: dict[str, list[float]] = {name: [] for name, _, _ in FIGURES}
        self._rate: float | None = None
        self._times = [time.monotonic()]

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a completed step. A figure that is not among them is not shown."""
        self.done += 1
        self._times = [*self._times, time.monotonic()][-RECENT_STEPS - 1 :]
        self._rate = metrics.get(RATE)
        for name, metric, _ in FIGURES:
            if metric in metrics:
                self._history[name] = [*self._history[name], metrics[metric]][-SPARK_STEPS:]

    @property
    def left(self) -> timedelta | None:
        """The time that the remaining steps take; None before the first step."""
        steps = len(self._times) - 1
        if not steps:
            return None
        return timedelta(seconds=round((self._times[-1] - self._times[0]) / steps * (self.total - self.done)))

    @property
    def rate(self) -> str:
        """Samples per second of the newest step; empty if it is not known."""
        return "" if self._rate is None else f"{self._rate:.0f} samples/s"

    def line(self) -> str:
        """The newest figures in one line."""
        shown = [f"{name} {value}" for name, value, _ in self._rows()]
        left = f"{self.left} left" if self.left else ""
        return "  ".join(part for part in (*shown, self.rate, left) if part)

    def table(self) -> Table:
        """The newest figures with their recent course, for a terminal."""
        table = Table.grid(padding=(0, 2))
        rows = self._rows()
        for _ in rows:
            table.add_column()
        # Two rows, so that the view fits into 80 columns.
        table.add_row(*(Text(f"{name} {value}") for name, value, _ in rows))
        table.add_row(*(Text(spark, style="cyan") for _, _, spark in rows))
        return table

    def as_html(self, waits_for: str = "") -> str:
        """The same for a notebook, with a progress bar."""
        cells = "".join(
            f"<td style='padding-right:1.5em'>{html.escape(name)} <b>{html.escape(value)}</b><br>{spark}</td>"
            for name, value, spark in self._rows()
        )
        left = "" if not self.left else f", {self.left} left"
        head = f"PPO step {self.done} of {self.total}{left}"
        bar = f"<progress value='{self.done}' max='{self.total}' style='width:20em'></progress>"
        wait = f"<div>{html.escape(waits_for)}</div>" if waits_for else ""
        return f"<div>{bar} {html.escape(head)}</div><table><tr>{cells}</tr></table>{wait}"

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, newest value and recent course of each figure that is known."""
        return [
            (name, format(values[-1], style), sparkline(values, width=min(12, len(values))))
            for name, _, style in FIGURES
            if (values := self._history[name])
        ]


def sparkline(values: Sequence[float], *, width: int) -> str:
    """The last `width` values as blocks, the lowest and the highest of them as the smallest and the largest block."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((value - low) * scale)] for value in shown)


def notebook_display() -> Any:
    """The module IPython.display in a notebook; None anywhere else, in a terminal's IPython too."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    # Plaudit doesn't depend on IPython: a notebook brings it.
    return importlib.import_module("IPython.display")
