"""Ctrl-C and SIGTERM end a run after its step, not in the middle of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM so that a step can end; a second one ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets only the main thread set handlers
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
