"""Remembers requests by their keys, so that one that comes again is not scored again."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from stage_rl.serving.limits import Limits, Refusal

Answering = Callable[[bytes], Coroutine[Any, Any, bytes]]
RECORD_BYTES = 512
"""What a kept answer takes beside its own bytes, roughly."""


@dataclass(frozen=True)
class Open:
    """A request that is worked on."""

    digest: bytes
    work: asyncio.Task[bytes]


@dataclass(frozen=True)
class Kept:
    """A request that was answered."""

    digest: bytes
    answer: bytes


class Answers:
    """The work that goes on, and the answers to the latest requests that had a key."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: dict[str, Open] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._kept_bytes = 0
        self._going_on: set[asyncio.Task[bytes]] = set()
        self.num_repeated = 0
        """Requests that came again."""

    @property
    def num_open(self) -> int:
        """Requests that are being worked on, be their clients still there or not."""
        return len(self._going_on)

    async def get(self, key: str | None, body: bytes, answering: Answering) -> bytes:
        """The answer to a body: that of the earlier request with this key where there was one.

        The work does not end with the client that waits for it. A Refusal where the key belongs
        to another body, and where the work takes longer than a request is held open.
        """
        if key is None:
            return await self._wait(self._begin(answering(body)))
        digest = (await asyncio.to_thread(hashlib.sha256, body)).digest()
        known = self._open.get(key) or self._kept.get(key)
        if known is None:
            known = Open(digest, self._begin(answering(body)))
            self._open[key] = known
            known.work.add_done_callback(lambda work: self._close(key, digest, work))
        elif known.digest != digest:
            raise Refusal(409, "key", "this key was another request's; write a new one")
        else:
            self.num_repeated += 1
        return known.answer if isinstance(known, Kept) else await self._wait(known.work)

    async def _wait(self, work: asyncio.Task[bytes]) -> bytes:
        done, _ = await asyncio.wait([work], timeout=self._limits.answer_s)
        if not done:
            raise Refusal(504, "slow", "not scored yet; send the same request again with its key")
        return work.result()

    def _begin(self, answering: Coroutine[Any, Any, bytes]) -> asyncio.Task[bytes]:
        work = asyncio.create_task(answering)
        self._going_on.add(work)
        work.add_done_callback(self._end)
        return work

    def _end(self, work: asyncio.Task[bytes]) -> None:
        self._going_on.discard(work)
        if not work.cancelled():
            work.exception()  # a client that is gone does not ask for it

    def _close(self, key: str, digest: bytes, work: asyncio.Task[bytes]) -> None:
        """Keeps an answer in place of the oldest ones; a failure is forgotten."""
        del self._open[key]
        if work.cancelled() or work.exception() is not None:
            return
        self._kept[key] = Kept(digest, work.result())
        self._kept_bytes += RECORD_BYTES + len(work.result())
        while self._kept_bytes > self._limits.kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= RECORD_BYTES + len(oldest.answer)
