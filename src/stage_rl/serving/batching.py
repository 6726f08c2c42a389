"""Collects images of several requests into one call of a reward.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stage_rl.rewards.base import Reward, Score
from stage_rl.rewards.judging import check_scores
from stage_rl.types import Prompt

Outcome = list[Score] | Exception
Task = Callable[[], Any]


@dataclass(eq=False)
class Job:
    """The images of one request, and where its scores go."""

    images_NHWC: NDArray[np.uint8]
    prompts: list[Prompt]
    scores: asyncio.Future[list[Score]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def settle(self, outcome: Outcome) -> None:
        """Hands the scores, or what was raised in their place, to whoever still waits."""
        if self.scores.done():
            return
        if isinstance(outcome, Exception):
            self.scores.set_exception(outcome)
        else:
            self.scores.set_result(outcome)


class Batcher:
    """Scores jobs in the order they came, several in a call where they fit."""

    def __init__(
        self,
        name: str,
        reward: Reward,
        *,
        batch_size: int,
        delay_s: float,
        whole_groups: bool,
        on_call: Callable[[int, float], None] = lambda num_images, seconds: None,
    ) -> None:
        self._name = name
        self._reward = reward
        # Images of two requests may be of one prompt without being one group.
        self._batch_size = 0 if whole_groups else batch_size
        self._delay_s = delay_s
        self._on_call = on_call
        self._waiting: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._worker = Worker(f"reward-{name}")
        self.call_began: float | None = None
        """`time.monotonic()` at the start of the call that is going on."""

    @property
    def num_waiting(self) -> int:
        """Images that no call has taken yet."""
        return sum(len(job.prompts) for job in self._waiting)

    async def score(self, images_NHWC: NDArray[np.uint8], prompts: list[Prompt]) -> list[Score]:
        """One score per image; raises what the reward raises on these images alone."""
        job = Job(images_NHWC, prompts)
        self._waiting.append(job)
        self._wake()
        return await job.scores

    async def run(self) -> None:
        """Calls the reward, one call at a time, until cancelled."""
        while True:
            await self._arrived.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._delay_s):
                    await self._full.wait()
            jobs = self._take()
            self.call_began = time.monotonic()
            outcomes = await asyncio.wrap_future(
                self._worker.do(lambda jobs=jobs: self._call(jobs))
            )
            self._on_call(sum(len(job.prompts) for job in jobs), time.monotonic() - self.call_began)
            self.call_began = None
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.settle(outcome)

    def _take(self) -> list[Job]:
        """The first job, and those after it that have its image size and room in its batch."""
        taken, left = [self._waiting.popleft()], deque[Job]()
        size, room = taken[0].images_NHWC.shape[1:], self._batch_size - len(taken[0].prompts)
        for job in self._waiting:
            if len(job.prompts) <= room and job.images_NHWC.shape[1:] == size:
                taken.append(job)
                room -= len(job.prompts)
            else:
                left.append(job)
        self._waiting = left
        self._wake()
        return taken

    def _wake(self) -> None:
        """Says whether there is something to do, and whether it is worth waiting for more."""
        for event, is_so in (
            (self._arrived, bool(self._waiting)),
            (self._full, self.num_waiting >= max(1, self._batch_size)),
        ):
            event.set() if is_so else event.clear()

    def _call(self, jobs: Sequence[Job]) -> list[Outcome]:
        """In the worker: what the reward says of each job.

        Where it fails on all, each is tried alone: one client's image must not cost another's.
        """
        try:
            return list(self._scores(jobs))
        except (Exception, SystemExit) as error:  # the user's code, which may raise anything
            if len(jobs) == 1:
                return [error if isinstance(error, Exception) else RuntimeError(repr(error))]
        return [outcome for job in jobs for outcome in self._call([job])]

    def _scores(self, jobs: Sequence[Job]) -> list[list[Score]]:
        images_NHWC = torch.from_numpy(np.concatenate([job.images_NHWC for job in jobs]))
        prompts = [prompt for job in jobs for prompt in job.prompts]
        scores = self._reward(images_NHWC, prompts)
        check_scores(self._name, scores, len(prompts))
        ends = np.cumsum([len(job.prompts) for job in jobs])
        starts = [0, *ends[:-1]]
        return [list(scores[i:j]) for i, j in zip(starts, ends, strict=True)]


class Worker:
    """One thread that works off what it is given. It does not keep a process from ending."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[tuple[Task, Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, task: Task) -> Future[Any]:
        """What a task returns, once its turn has come."""
        future: Future[Any] = Future()
        self._tasks.put((task, future))
        return future

    def _work(self) -> None:
        while True:
            task, future = self._tasks.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
