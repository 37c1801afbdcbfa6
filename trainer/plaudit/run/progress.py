"""Progress of a long run: a bar on a terminal, or lines in a log file."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from plaudit.run.metrics import KL, REWARD_MEAN

LINE_EVERY_S = 10.0


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
    """A progress bar with a line below it for waits."""

    waits_for = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.waits_for:
            yield Text(self.waits_for)


class StepProgress:
    """Shows reward, KL and samples per second of each step. While the bar is off, `waiting_line` shows waits."""

    def __init__(self, total: int, done: int, waiting_line: WaitingLine) -> None:
        self._total = total
        self._done = done
        self._line_at = 0.0
        self._waiting_line = waiting_line
        self._bar: _Bar | None = None
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
            with self._bar:
                yield self

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a completed step."""
        self._done += 1
        rate = metrics["time/samples_per_second"]
        text = f"reward {metrics[REWARD_MEAN]:+.2f}  KL {metrics[KL]:.2f}  {rate:.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif self._done == self._total or time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            print(f"PPO step {self._done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def waiting(self, what: str) -> None:
        """Show what the run waits for, or "" when the wait is over."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.waits_for = what
            self._bar.refresh()
        else:
            self._waiting_line(what)


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
