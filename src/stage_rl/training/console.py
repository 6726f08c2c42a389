"""The live view of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SHOWN = ("reward/mean", "entropy/gap", "kl/mean", "images_per_s", "time/step_s")
"""Metrics of the line, under the names that they have in metrics.jsonl."""


def summary(numbers: Mapping[str, float]) -> str:
    """The few numbers that fit on a line."""
    return "  ".join(f"{name} {numbers[name]:.3f}" for name in SHOWN if name in numbers)


class LiveView:
    """Shows a run step by step. Make it with `live_view`."""

    def __init__(self, console: Console, progress: Progress | None, *, first: int, last: int):
        self._console = console
        self._progress = progress
        self._started, self._first, self._last = time.monotonic(), first, last
        self._task = None
        if progress is not None:
            self._task = progress.add_task("train", total=last, completed=first, numbers="")

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, highlight=False, markup=False)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers after a step (counted from 1)."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, numbers=summary(numbers))
            return
        pace = (time.monotonic() - self._started) / (step - self._first)
        left = pace * (self._last - step)
        self.say(f"step {step}/{self._last}  {summary(numbers)}  left {left / 60:.1f} min")


@contextmanager
def live_view(*, first: int, last: int, rank: int = 0) -> Iterator[LiveView]:
    """The view for steps `first` + 1 to `last`; warnings appear above the bar.

    Of several processes the first one shows the steps; the others have their warnings alone.
    """
    console = Console(file=sys.stdout, soft_wrap=True, quiet=rank > 0)
    handler = RichHandler(console=console, show_path=False, show_time=False, markup=False)
    if rank:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"process {rank}: %(levelname)s %(message)s"))
    logger = logging.getLogger("stage_rl")
    logger.addHandler(handler)
    try:
        if rank or not console.is_terminal:
            yield LiveView(console, None, first=first, last=last)
            return
        columns = (
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            yield LiveView(console, progress, first=first, last=last)
    finally:
        logger.removeHandler(handler)
