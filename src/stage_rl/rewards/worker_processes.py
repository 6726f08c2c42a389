"""Several processes for scorers that keep a CPU core busy each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from stage_rl.rewards.ocr_engines import Line, OcrReader

_reader: OcrReader | None = None
"""The engine of a worker process; there is none in the trainer's own."""


class ParallelReader:
    """A reader whose pictures are read by several processes, each with an engine of its own."""

    def __init__(self, make: Callable[[], OcrReader], *, processes: int) -> None:
        assert processes > 1, processes
        self._make = make
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def read(self, pictures: Sequence[Any]) -> list[list[Line]]:
        """The lines of each picture; a RuntimeError where a worker died, new ones follow."""
        executor = self._executor or self._start()
        # One picture a task: pictures differ in how long they take.
        try:
            return list(executor.map(_read_one, pictures))
        except BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                "a worker process of the OCR reward died, for want of memory, or because a script "
                "that trains lacks `if __name__ == '__main__':`; write processes: 1 to do without"
            ) from error

    def close(self) -> None:
        """Ends the processes; the next call starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
        self._executor = None

    def _start(self) -> ProcessPoolExecutor:
        self._executor = ProcessPoolExecutor(
            self._processes,
            # A fork would copy the trainer's threads and GPU as they are.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._make,),
        )
        return self._executor


def _begin(make: Callable[[], OcrReader]) -> None:
    """In a worker: builds its engine. Ctrl-C is the trainer's to answer."""
    global _reader
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reader = make()


def _end_with_parent() -> None:
    """Workers hold each other's pipes open, so none would see that the trainer was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not in a worker process"
    parent.join()
    os._exit(1)


def _read_one(picture: Any) -> list[Line]:
    assert _reader is not None, "not in a worker process"
    return _reader.read([picture])[0]
