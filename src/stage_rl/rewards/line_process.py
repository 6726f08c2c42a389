"""A program that is written lines and answers with lines, without either side waiting in vain."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO

STOP_S = 5.0
"""How long a program may take to end after its input has ended."""


class ProcessFault(Exception):
    """The program could not be started, has ended, or says nothing."""


class LineProcess:
    """Starts a program when it is first written to, and again after `stop`.

    It ends with this object or with the interpreter, and sees its input end if that is killed.
    """

    def __init__(self, command: Sequence[str], *, cwd: str | None = None) -> None:
        self._command = tuple(command)
        self._cwd = cwd
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: deque[str] = deque(maxlen=5)
        self._writers: list[threading.Thread] = []
        self._ending: weakref.finalize | None = None

    def send(self, lines: Sequence[str]) -> None:
        """Writes lines, from a thread of its own: the program need not read before it answers."""
        process = self._process or self._start()
        text = "".join(f"{line}\n" for line in lines)
        writer = threading.Thread(target=_write, args=(process.stdin, text), daemon=True)
        writer.start()
        self._writers[:] = [*(one for one in self._writers if one.is_alive()), writer]

    def receive(self, timeout_s: float) -> str:
        """The next line; a ProcessFault where none comes in time or the program has ended."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty as error:
            raise ProcessFault(f"gave no answer for {timeout_s:g} s{self._last_words()}") from error
        if line is None:
            assert self._process is not None
            status = self._process.wait()
            raise ProcessFault(f"ended with exit status {status}{self._last_words()}")
        return line

    def stop(self) -> None:
        """Ends the program if it runs."""
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None

    def _start(self) -> subprocess.Popen[str]:
        try:
            process = subprocess.Popen(
                self._command,
                cwd=self._cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                # Ctrl-C is the trainer's to answer: it finishes the step first.
                start_new_session=True,
            )
        except OSError as error:
            raise ProcessFault(f"'{self._command[0]}' cannot be started: {error}") from error
        lines, errors = queue.Queue(), deque(maxlen=5)
        listeners = (
            threading.Thread(target=_listen, args=(process.stdout, lines), daemon=True),
            threading.Thread(target=_remember, args=(process.stderr, errors), daemon=True),
        )
        for listener in listeners:
            listener.start()
        self._lines, self._errors, self._process = lines, errors, process
        self._writers = []
        self._ending = weakref.finalize(self, _end, process, listeners, self._writers)
        return process

    def _last_words(self) -> str:
        """What it wrote last to its standard error, in one line."""
        return f" ({'; '.join(self._errors)})" if self._errors else ""


def _write(stream: IO[str], text: str) -> None:
    # A program that ends early shows on its output, where it is reported.
    with contextlib.suppress(BrokenPipeError, ValueError):
        stream.write(text)
        stream.flush()


def _listen(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    """Puts each line that is not empty, then None at the end."""
    for line in stream:
        if line.strip():
            lines.put(line.strip())
    lines.put(None)


def _remember(stream: IO[str], errors: deque[str]) -> None:
    errors.extend(line.strip() for line in stream if line.strip())


def _end(
    process: subprocess.Popen[str],
    listeners: Sequence[threading.Thread],
    writers: Sequence[threading.Thread],
) -> None:
    """Ends a program, by force with all it started if it does not by itself."""
    streams = [stream for stream in (process.stdin, process.stdout, process.stderr) if stream]
    is_written_to = any(writer.is_alive() for writer in writers)
    try:
        # To close a stream that a thread is writing to would wait for it.
        if not is_written_to:
            _close(streams[0])
        process.wait(0 if is_written_to else STOP_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for thread in (*listeners, *writers):
        thread.join(STOP_S)
    for stream in streams:
        _close(stream)


def _close(stream: IO[str]) -> None:
    # What the program no longer reads is of no use to it.
    with contextlib.suppress(BrokenPipeError):
        stream.close()
