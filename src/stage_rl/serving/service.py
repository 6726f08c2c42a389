"""One reward of a server: from the body of a request to the body of its answer."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import logging
import queue
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from pydantic_core import from_json

from stage_rl.errors import StageError
from stage_rl.rewards.base import Reward, RewardConfig, Score
from stage_rl.rewards.judge import check_scores
from stage_rl.rewards.protocol import Drawing, Offer, Question, answer_json
from stage_rl.serving.limits import PIXEL_BYTES, Held, Limits, Refusal
from stage_rl.types import Prompt

log = logging.getLogger(__name__)


class RewardService:
    """Answers requests for the scores of one reward."""

    def __init__(
        self, config: RewardConfig, batcher: Batcher, *, limits: Limits, held: Held
    ) -> None:
        self._config = config
        self._limits = limits
        self._held = held
        self.batcher = batcher
        self.offer = Offer(
            name=config.name,
            kind=config.kind,
            required_fields=list(config.required_fields),
            whole_groups=config.whole_groups,
        )

    async def answer(self, body: bytes) -> bytes:
        """The scores of a question as JSON; a Refusal where there are none."""
        prompts, files, pixels = await asyncio.to_thread(self._read, body)
        with self._held.hold(PIXEL_BYTES * pixels):
            images_NHWC = await asyncio.to_thread(decode, files)
            scores = await self._score(images_NHWC, prompts)
        return answer_json(scores)

    def _read(self, body: bytes) -> tuple[list[Prompt], list[bytes], int]:
        """The prompts, the PNG files, and the pixels in them."""
        items = _question(body).items
        if len(items) > self._limits.images:
            most = f"at most {self._limits.images}"
            raise Refusal(413, "images", f"{len(items)} images; send {most} in a request")
        prompts = [Prompt(item.prompt, item.index, item.metadata) for item in items]
        for place, prompt in enumerate(prompts):
            unsupported_reason = self._config.unsupported_reason(prompt)
            if unsupported_reason:
                what = f"items.{place} ('{prompt.text[:40]}'): reward '{self._config.name}'"
                raise Refusal(422, "prompt", f"{what} {unsupported_reason}")
        return prompts, *png_files(items, self._limits)

    async def _score(self, images_NHWC, prompts: list[Prompt]) -> list[Score]:
        name = self._config.name
        try:
            return await self.batcher.score(images_NHWC, prompts)
        except StageError as error:
            raise Refusal(422, "refused", str(error)) from error
        except Exception as error:  # the user's code, which may raise anything
            log.warning("reward '%s' failed", name, exc_info=error)
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise Refusal(500, "reward_failed", what) from error


def _question(body: bytes) -> Question:
    """The body as a question; a Refusal says what is wrong with it."""
    try:
        return Question.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(422, "question", f"{where or 'body'}: {first['msg']}") from error
    except ValueError as error:
        raise Refusal(400, "json", f"is no JSON: {error}") from error


# Reads the images of a request, and refuses what is no image or would not fit.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


SIGNATURE = b"\x89PNG\r\n\x1a\n"

HEADER = struct.Struct(">8s4x4sIIBB")
"""Signature, length of the first chunk, its name, width, height, bits, colour type."""

RGB_8_BIT = (8, 2)

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)
"""What Pillow raises on a PNG that is not whole."""


def png_files(items: Sequence[Drawing], limits: Limits) -> tuple[list[bytes], int]:
    """The PNG files of a request, and the pixels that they decode to.

    Sizes are those of the headers: nothing is decoded before all are known to fit. A Refusal says
    which image is at fault.
    """
    files: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    for place, item in enumerate(items):
        try:
            files.append(base64.b64decode(item.image_png, validate=True))
            sizes.append(_size(files[-1]))
        except (ValueError, binascii.Error) as error:
            raise Refusal(422, "image", f"items.{place}.image_png: {error}") from error
        width, height = sizes[-1]
        if width * height > limits.image_pixels:
            most = f"at most {limits.image_pixels} pixels"
            raise Refusal(413, "pixels", f"items.{place}: {width} x {height}; send {most}")
    if len(set(sizes)) > 1:
        raise Refusal(422, "image", "images of several sizes; send one request for each size")
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.request_pixels:
        most = f"at most {limits.request_pixels} in a request"
        raise Refusal(413, "pixels", f"{pixels} pixels; send {most}, in fewer images")
    return files, pixels


def decode(files: Sequence[bytes]) -> NDArray[np.uint8]:
    """images_NHWC of PNG files of one size; a Refusal says which is broken."""
    return np.stack([_pixels(file, place) for place, file in enumerate(files)])


def _size(file: bytes) -> tuple[int, int]:
    if len(file) < HEADER.size:
        raise ValueError("is no PNG; send 8-bit RGB as PNG in base64")
    signature, chunk, width, height, *kind = HEADER.unpack_from(file)
    if signature != SIGNATURE or chunk != b"IHDR":
        raise ValueError("is no PNG; send 8-bit RGB as PNG in base64")
    if tuple(kind) != RGB_8_BIT:
        raise ValueError("is not 8-bit RGB; convert it first")
    if not width or not height:
        raise ValueError("has no pixels")
    return width, height


def _pixels(file: bytes, place: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
            image.load()
            pixels_HWC = np.asarray(image)
    except BROKEN as error:
        what = f"items.{place}.image_png: is a broken PNG ({error})"
        raise Refusal(422, "image", what) from error
    _, _, width, height, *_ = HEADER.unpack_from(file)
    if pixels_HWC.shape != (height, width, 3):
        raise Refusal(422, "image", f"items.{place}.image_png: is a broken PNG")
    return pixels_HWC


# Collects images of several requests into one call of a reward.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


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
