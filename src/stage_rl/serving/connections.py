"""The connections of a reward server: none holds one without asking, and none fills the log."""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import time
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 10.0
"""Longest time from the first byte of a request, or from the connection, to the end of its head;
from an answer to the end of a body that it did not wait for; and in which a client reads nothing
of answers that no buffer takes."""

MAX_CONNECTIONS = 4096

OTHER_FILES = 200
"""File descriptors that are left for models and sockets of the reward."""


def connection_class() -> Callable[..., Connection]:
    """What makes the connections of one server, as many as the process may have files open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - OTHER_FILES
    return functools.partial(Connection, {}, max(64, min(MAX_CONNECTIONS, files)))


class Connection(H11Protocol):
    """Closes itself where the head of a request, or a body that is not read, does not end in time,
    and where answers are not read.

    Where there are too many connections, the one that has been without a request for longest makes
    room: a client that was idle connects again.
    """

    def __init__(
        self, waiting: dict[Connection, None], max_connections: int, **options: Any
    ) -> None:
        super().__init__(**options)
        self._waiting = waiting
        """Those of the server that have no request, the longest first."""
        self._max_connections = max_connections
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._waiting[self] = None
        self._expect_end()
        if len(self.connections) > self._max_connections:
            longest = next(iter(self._waiting))
            del self._waiting[longest]  # it hears of its end later than others may come
            longest.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering:
            self._has_request()
        else:
            self._expect_end()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_answering:  # what came behind the request was the next one
            return
        self._waiting[self] = None
        # The rest of a body that nobody read is thrown away, so that a client which is still
        # sending gets to its answer; it has as long for that as for a head.
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            self._expect_end()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(HEADER_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_read()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_request()
        self._is_read()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        """Whether a request is worked on; its body has a deadline of its own."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_end(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_S, self.transport.abort)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        self._unread = None

    def _has_request(self) -> None:
        self._waiting.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None


class LogLimit(logging.Filter):
    """Lets a few records through in a time, and says with the next how many it left out."""

    MOST, PERIOD_S = 20, 10.0

    def __init__(self) -> None:
        super().__init__()
        self._began, self._count = -self.PERIOD_S, 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now - self._began >= self.PERIOD_S:
            left_out = self._count - self.MOST
            if left_out > 0:
                record.msg, record.args = f"{record.getMessage()} ({left_out} left out before)", ()
            self._began, self._count = now, 0
        self._count += 1
        return self._count <= self.MOST


LOG_LIMITS = {name: LogLimit() for name in ("uvicorn.error", "asyncio", "stage_rl.serving.service")}


def limit_logs() -> None:
    """Limits what strangers can make the server write."""
    for name, limit in LOG_LIMITS.items():
        logging.getLogger(name).addFilter(limit)
