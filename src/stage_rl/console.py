"""What a long run says while it lasts, on a terminal or elsewhere, and how a signal stops it; how
lines of a table stand below each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) if row else ""
        for row in rows
    ]


SHOWN = (
    *("reward/mean", "reward/std", "reward/equal_groups", "entropy/gap", "kl/mean", "grad/norm"),
    *("images_per_s", "time/step_s"),
)
"""Metrics of a line, under the names that they have in metrics.jsonl."""

SHOWN_IN_BAR = ("reward/mean", "kl/mean")
"""Those that a bar has room for in 80 columns."""

STEPS_BETWEEN_LINES = 10
"""On a terminal; elsewhere each step has a line."""

MOST_LEFT_S = 1e9

STEPS_OF_PACE = 20
"""Steps whose time says how long the others take."""


def summary(numbers: Mapping[str, float | None], names: Sequence[str] = SHOWN) -> str:
    """Some of the numbers of a step on a line."""
    known = {name: value for name in names if (value := numbers.get(name)) is not None}
    return "  ".join(f"{name} {value:.3f}" for name, value in known.items())


class _Console(Console):
    """A console that falls silent where nobody reads it any more: a run goes on without."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:  # of a full disk, say
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is left in the buffer must not fail at the end of the process.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class LiveView:
    """Shows a run step by step. Make it with `live_view`."""

    def __init__(self, console: Console, progress: Progress | None, *, first: int, last: int):
        self._console, self._progress, self._last = console, progress, last
        self._times: deque[float] = deque(maxlen=STEPS_OF_PACE)
        self._task = None
        if progress is not None:
            self._task = progress.add_task(
                "train", total=last, completed=first, numbers="", left="-:--:--"
            )

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def show(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Shows the numbers after a step (counted from 1)."""
        self._times.append(numbers.get("time/step_s") or 0.0)
        left_s = (self._last - step) * sum(self._times) / len(self._times)
        # A run that is watched may say anything.
        left = str(timedelta(seconds=round(min(max(left_s, 0), MOST_LEFT_S))))
        if self._progress is not None and self._task is not None:
            shown = summary(numbers, SHOWN_IN_BAR)
            self._progress.update(self._task, completed=step, numbers=shown, left=left)
            if step % STEPS_BETWEEN_LINES and step != self._last:
                return
        self.say(f"step {step}/{self._last}  {summary(numbers)}  left {left}")


@contextlib.contextmanager
def live_view(*, first: int, last: int, rank: int = 0) -> Iterator[LiveView]:
    """The view for steps `first` + 1 to `last`; warnings appear above the bar.

    Of several processes the first one shows the steps; the others have their warnings alone.
    """
    console = _Console(file=sys.stdout, soft_wrap=True, quiet=rank > 0)
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
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[numbers]}", markup=False),
        )
        with Progress(*columns, console=console) as progress:
            yield LiveView(console, progress, first=first, last=last)
    finally:
        logger.removeHandler(handler)


def say_aside(text: str) -> None:
    """Prints a line on stderr; where nobody reads it, work goes on without."""
    _Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)


SECONDS_BETWEEN_LINES = 20.0


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with how many more are done; what it shows goes to stderr."""
    if not sys.stderr.isatty():
        yield _lines(label, total)
        return
    description = TextColumn("{task.description}", markup=False)
    columns = (description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_Console(stderr=True), transient=True) as bar:
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
        say_aside(f"{label}: {done}/{total}, {left_s:.0f} s left")
        shown = now

    return advance


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C, SIGTERM and SIGHUP so that a step can end; a second one of a kind ends the
    process at once.
    """
    received: list[int] = []
    with on_stop_signal(received.append):
        yield received


@contextlib.contextmanager
def on_stop_signal(handle: Callable[[int], object]) -> Iterator[None]:
    """Calls a function with the number of the first Ctrl-C, SIGTERM or SIGHUP, which may raise.

    A signal that is ignored, as nohup has it, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread set handlers
        return

    def once(number: int, _frame: object) -> None:
        signal.signal(number, before[number])
        handle(number)

    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
