"""Showing a long run to a person: a bar on a terminal, lines in a log file."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.metrics import KL, REWARD_MEAN

LINE_EVERY_S = 10.0


class StepProgress:
    """Reward, KL and samples per second as they come."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._done = done
        self._line_at = 0.0
        self._waiting_line_at = float("-inf")
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("PPO"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
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
        """One step is done."""
        self._done += 1
        rate = metrics["time/samples_per_second"]
        text = f"reward {metrics[REWARD_MEAN]:+.2f}  KL {metrics[KL]:.2f}  {rate:.0f} samples/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=text)
        elif self._done == self._total or time.monotonic() - self._line_at >= LINE_EVERY_S:
            self._line_at = time.monotonic()
            print(f"PPO step {self._done}/{self._total}  {text}", file=sys.stderr, flush=True)

    def waiting(self, what: str) -> None:
        """Say what the run waits for, "" when the wait is over. Told so at every try, it writes a line less often."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.update(self._task, description=what)
            return
        now = time.monotonic()
        if what and now - self._waiting_line_at >= LINE_EVERY_S:
            self._waiting_line_at = now
            print(what, file=sys.stderr, flush=True)
        elif not what:
            self._waiting_line_at = float("-inf")
            print("the reward is there", file=sys.stderr, flush=True)
