"""Progress of a long run: a bar on a terminal, a view in a notebook, or lines in a log file."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from plaudit.run.live import LiveFigures, notebook_display

LINE_EVERY_S = 10.0
NOTEBOOK_EVERY_S = 1.0


class WaitingLine:
    """Shows what the run waits for: one updating line on a terminal, or occasional lines in a log file."""

    def __init__(self) -> None:
        self._line_at = float("-inf")
        self._status = Status("", console=Console(stderr=True)) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, what: str) -> None:
        """Show `what`, or "" when the wait is over. May be called for every retry, from any thread."""
        if self._status is not None:
            if what:
                self._status.update(escape(what))
                self._status.start()
            else:
                self._status.stop()
            return
        now = time.monotonic()
        if what and now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            print(what, file=sys.stderr, flush=True)
        elif not what:
            self._line_at = float("-inf")
            print("the reward is there", file=sys.stderr, flush=True)


class _Bar(Progress):
    """A progress bar with a line below it for waits, and figures below both."""

    waits_for = ""
    figures: LiveFigures | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.waits_for:
            yield Text(self.waits_for)
        if self.figures is not None:
            yield self.figures.table()


class StepProgress:
    """Shows the figures of each step. While the bar is off, `waiting_line` shows waits.

    On a terminal, a bar and a table of figures with their recent course; in a notebook, the same as one output that is
    updated; elsewhere, a line every few seconds.
    """

    def __init__(self, total: int, done: int, waiting_line: WaitingLine) -> None:
        self._figures = LiveFigures(total, done)
        self._line_at = 0.0
        self._waiting_line = waiting_line
        self._bar: _Bar | None = None
        self._notebook: _NotebookView | None = None
        display = notebook_display()
        if display is not None:
            self._notebook = _NotebookView(display, self._figures)
            return
        if sys.stderr.isatty():
            self._bar = _Bar(
                TextColumn("PPO"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    @contextmanager
    def showing(self) -> Iterator["StepProgress"]:
        """Show for the length of the block."""
        if self._bar is None:
            yield self
        else:
            self._bar.figures = self._figures
            with self._bar:
                yield self

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a completed step."""
        figures = self._figures
        figures.add(metrics)
        is_last = figures.done == figures.total
        if self._notebook is not None:
            self._notebook.update(at_once=is_last)
        elif self._bar is not None:
            self._bar.update(self._task, completed=figures.done, description=figures.rate)
        elif is_last or time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            print(f"PPO step {figures.done}/{figures.total}  {figures.line()}", file=sys.stderr, flush=True)

    def waiting(self, what: str) -> None:
        """Show what the run waits for, or "" when the wait is over."""
        if self._notebook is not None:
            self._notebook.waiting(what)
        elif self._bar is not None and self._bar.live.is_started:
            self._bar.waits_for = what
            self._bar.refresh()
        else:
            self._waiting_line(what)


class _NotebookView:
    """One output of a notebook that is updated, at most once a second."""

    def __init__(self, display: Any, figures: LiveFigures) -> None:
        self._html: Any = display.HTML
        self._figures, self._waits_for, self._at = figures, "", float("-inf")
        self._handle = display.display(self._html(figures.as_html()), display_id=True)

    def update(self, *, at_once: bool = False) -> None:
        """Show the newest figures."""
        if at_once or time.monotonic() - self._at >= NOTEBOOK_EVERY_S:
            self._at = time.monotonic()
            self._handle.update(self._html(self._figures.as_html(self._waits_for)))

    def waiting(self, what: str) -> None:
        """Show what is waited for, or "" when the wait is over."""
        self._waits_for = what
        self.update(at_once=not what)


class Counting:
    """Counts completed items, optionally of a total: a bar on a terminal, or occasional lines in a log file."""

    def __init__(self, what: str, total: int | None = None, done: int = 0) -> None:
        self._what = what
        self._total = total
        self._done = done
        self._line_at = time.monotonic()
        self._lock = threading.Lock()
        self._bar: _Bar | None = None
        if sys.stderr.isatty():
            self._bar = _Bar(
                TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int = 1) -> None:
        """Count more completed items. May be called from any thread."""
        with self._lock:
            self._done += count
            if self._bar is not None:
                self._bar.waits_for = ""
                self._bar.update(self._task, completed=self._done)
            elif time.monotonic() - self._line_at >= LINE_EVERY_S:
                self._line_at = time.monotonic()
                of = "" if self._total is None else f"/{self._total}"
                print(f"{self._done}{of} {self._what}", file=sys.stderr, flush=True)

    def waiting(self, what: str) -> None:
        """Show what is waited for, or "" when the wait is over."""
        with self._lock:
            if self._bar is not None:
                self._bar.waits_for = what
                self._bar.refresh()
            elif what and time.monotonic() - self._line_at >= LINE_EVERY_S:
                self._line_at = time.monotonic()
                print(what, file=sys.stderr, flush=True)
