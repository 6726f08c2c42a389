"""How far a long run is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with how many more are done."""
    if not sys.stderr.isatty():
        yield _lines(label, total)
        return
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda number: bar.advance(task, number)


def _lines(label: str, total: int) -> Callable[[int], None]:
    started = shown = time.monotonic()
    done = 0

    def advance(number: int) -> None:
        nonlocal done, shown
        done += number
        now = time.monotonic()
        if now - shown < SECONDS_BETWEEN_LINES:
            return
        left_s = (now - started) / done * (total - done)
        print(f"{label}: {done}/{total}, {left_s:.0f} s left", file=sys.stderr, flush=True)
        shown = now

    return advance
