"""Threads that wait for rewards, none of which keeps the process from ending."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")

STOP_S = 30.0
"""How long a run that is asked to stop waits for rewards."""


class RewardsPendingError(Exception):
    """A stop was asked for, and the rewards that were waited for did not come."""


def on_thread(function: Callable[[], T], name: str) -> Future[T]:
    """What a function returns; one that never does does not keep the process from ending.

    On a GPU it works where the caller does: device and stream are a thread's own.
    """
    future: Future[T] = Future()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                future.set_result(function())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def result_of(
    future: Future[T], *, timeout_s: float | None = None, signals: Sequence[int] = ()
) -> T:
    """The result, once it is there.

    A TimeoutError where it takes longer than `timeout_s`; a `RewardsPendingError` where it is not
    there `STOP_S` after the first of `signals`, which may come meanwhile.
    """
    started, stop = time.monotonic(), math.inf
    while not wait([future], timeout=0.5 if timeout_s is None else min(0.5, timeout_s)).done:
        now = time.monotonic()
        if signals:
            stop = min(stop, now + STOP_S)
        if now > stop:
            raise RewardsPendingError
        if timeout_s is not None and now - started >= timeout_s:
            raise TimeoutError
    return future.result()
