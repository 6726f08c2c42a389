"""One reward of a server: from the body of a request to the body of its answer.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import logging
import queue
import struct
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

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
from stage_rl.serving.limits import PIXEL_BYTES, Limits, MemoryBudget, Metrics, Refusal
from stage_rl.types import Prompt

log = logging.getLogger(__name__)


class RewardService:
    """Answers requests for the scores of one reward."""

    def __init__(
        self, config: RewardConfig, batcher: Batcher, *, limits: Limits, budget: MemoryBudget
    ) -> None:
        self._config = config
        self._limits = limits
        self._budget = budget
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
        with self._budget.hold(PIXEL_BYTES * pixels):
            images_NHWC = await asyncio.to_thread(decode, files)
            try:
                return answer_json(await self.batcher.score(images_NHWC, prompts))
            except StageError as error:
                raise Refusal(422, "refused", str(error)) from error
            except Exception as error:  # the user's code, which may raise anything
                log.warning("reward '%s' failed", self._config.name, exc_info=error)
                message = " ".join(f"{type(error).__name__}: {error}".split())
                raise Refusal(500, "reward_failed", message) from error

    def _read(self, body: bytes) -> tuple[list[Prompt], list[bytes], int]:
        """The prompts, the PNG files, and the pixels in them."""
        items = _question(body).items
        if len(items) > self._limits.images:
            message = f"{len(items)} images; send at most {self._limits.images} in a request"
            raise Refusal(413, "images", message)
        prompts = [Prompt(item.prompt, item.index, item.metadata) for item in items]
        for place, prompt in enumerate(prompts):
            unsupported_reason = self._config.unsupported_reason(prompt)
            if unsupported_reason:
                message = f"items.{place} ('{prompt.text[:40]}'): reward '{self._config.name}'"
                raise Refusal(422, "prompt", f"{message} {unsupported_reason}")
        return prompts, *png_files(items, self._limits)


def _question(body: bytes) -> Question:
    try:
        return Question.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(422, "question", f"{where or 'body'}: {first['msg']}") from error
    except ValueError as error:
        raise Refusal(400, "json", f"is not JSON: {error}") from error


HEADER = struct.Struct(">8s4x4sIIBB")
"""Of a PNG: signature, length of the first chunk, its name, width, height, bits, colour type."""

CHUNK = struct.Struct(">I4s")
"""Of a PNG: length of a chunk and its name; the data and a sum of 4 bytes follow."""

FIRST_CHUNK = 8 + CHUNK.size + 13 + 4
"""Bytes of the signature and the header chunk."""

COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
"""Chunks that Pillow would unpack to a thousand times their size."""

RGB_8_BIT = [8, 2]

BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError),
    Image.DecompressionBombError,
)
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
        except ValueError as error:
            raise Refusal(422, "image", f"items.{place}.image_png: {error}") from error
        width, height = sizes[-1]
        if width * height > limits.image_pixels:
            message = f"{width} x {height}; send at most {limits.image_pixels} pixels"
            raise Refusal(413, "pixels", f"items.{place}: {message}")
    if len(set(sizes)) > 1:
        raise Refusal(422, "image", "images of several sizes; send one request for each size")
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.request_pixels:
        message = f"{pixels} pixels; send at most {limits.request_pixels} in a request"
        raise Refusal(413, "pixels", f"{message}, in fewer images")
    return files, pixels


def _size(file: bytes) -> tuple[int, int]:
    if len(file) < HEADER.size:
        raise ValueError("is not a PNG; send 8-bit RGB as PNG in base64")
    signature, chunk, width, height, *kind = HEADER.unpack_from(file)
    if (signature, chunk) != (b"\x89PNG\r\n\x1a\n", b"IHDR"):
        raise ValueError("is not a PNG; send 8-bit RGB as PNG in base64")
    if kind != RGB_8_BIT:
        raise ValueError("is not 8-bit RGB; convert it first")
    if not width or not height:
        raise ValueError("has no pixels")
    place = FIRST_CHUNK
    while place + 8 <= len(file):
        length, name = CHUNK.unpack_from(file, place)
        if name == b"IHDR":  # Pillow would go by the last
            raise ValueError("has two headers")
        if name in COMPRESSED:
            raise ValueError("holds compressed text or a colour profile; save it without")
        place += CHUNK.size + length + 4
    return width, height


def decode(files: Sequence[bytes]) -> NDArray[np.uint8]:
    """images_NHWC of PNG files of one size; a Refusal says which is broken."""
    images = []
    for place, file in enumerate(files):
        width, height = _size(file)
        try:
            with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
                if image.size != (width, height):
                    raise ValueError("its chunks contradict each other")
                image.load()
                images.append(np.asarray(image))
            if images[-1].shape != (height, width, 3):
                raise ValueError("its chunks contradict each other")
        except BROKEN as error:
            message = f"items.{place}.image_png: is a broken PNG ({error})"
            raise Refusal(422, "image", message) from error
    return np.stack(images)


Outcome = list[Score] | Exception


@dataclass(eq=False, frozen=True)
class Job:
    """The images of one request, and where its scores go."""

    images_NHWC: NDArray[np.uint8]
    prompts: list[Prompt]
    scores: asyncio.Future[list[Score]]


class Batcher:
    """Scores jobs in the order they came, several in a call where they fit.

    With a batch size of 0 each job is a call of its own.
    """

    def __init__(
        self, name: str, reward: Reward, *, batch_size: int, delay_s: float, metrics: Metrics
    ) -> None:
        self._name = name
        self._reward = reward
        self._batch_size = batch_size
        self._delay_s = delay_s
        self._metrics = metrics
        self._waiting: list[Job] = []
        self._arrived = asyncio.Condition()
        self._calls: queue.SimpleQueue[tuple[list[Job], Future[list[Outcome]]]] = (
            queue.SimpleQueue()
        )
        self.call_began: float | None = None
        """`time.monotonic()` at the start of the call that is going on."""
        # One thread for all calls, which does not keep the process from ending.
        threading.Thread(target=self._work, name=f"reward-{name}", daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """Images that no call has taken yet."""
        return sum(len(job.prompts) for job in self._waiting)

    async def score(self, images_NHWC: NDArray[np.uint8], prompts: list[Prompt]) -> list[Score]:
        """One score per image; raises what the reward raises on these images alone."""
        job = Job(images_NHWC, prompts, asyncio.get_running_loop().create_future())
        async with self._arrived:
            self._waiting.append(job)
            self._arrived.notify()
        return await job.scores

    async def run(self) -> None:
        """Calls the reward, one call at a time, until cancelled."""
        while True:
            jobs = await self._next()
            self.call_began = time.monotonic()
            future: Future[list[Outcome]] = Future()
            self._calls.put((jobs, future))
            outcomes = await asyncio.wrap_future(future)
            self._metrics.call_images.labels(self._name).observe(sum(len(j.prompts) for j in jobs))
            self._metrics.call_s.labels(self._name).observe(time.monotonic() - self.call_began)
            self.call_began = None
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.scores.done():
                    continue  # nobody waits for it any more
                if isinstance(outcome, Exception):
                    job.scores.set_exception(outcome)
                else:
                    job.scores.set_result(outcome)

    async def _next(self) -> list[Job]:
        """The first job, and those after it that have its image size and room in its batch."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: self._waiting)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._delay_s):
                    await self._arrived.wait_for(lambda: self.num_waiting >= self._batch_size)
            jobs, left = self._waiting[:1], []
            size, room = jobs[0].images_NHWC.shape[1:], self._batch_size - len(jobs[0].prompts)
            for job in self._waiting[1:]:
                if len(job.prompts) <= room and job.images_NHWC.shape[1:] == size:
                    jobs.append(job)
                    room -= len(job.prompts)
                else:
                    left.append(job)
            self._waiting = left
        return jobs

    def _work(self) -> None:
        while True:
            jobs, future = self._calls.get()
            if future.set_running_or_notify_cancel():
                future.set_result(self._call(jobs))

    def _call(self, jobs: Sequence[Job]) -> list[Outcome]:
        """What the reward says of each job.

        Where it fails on all, each is tried alone: one client's image must not cost another's.
        """
        prompts = [prompt for job in jobs for prompt in job.prompts]
        try:
            images_NHWC = torch.from_numpy(np.concatenate([job.images_NHWC for job in jobs]))
            scores = self._reward(images_NHWC, prompts)
            check_scores(self._name, scores, len(prompts))
        except BaseException as error:  # the user's code, which may raise anything
            if len(jobs) == 1:
                return [error if isinstance(error, Exception) else RuntimeError(repr(error))]
            return [outcome for job in jobs for outcome in self._call([job])]
        rest = iter(scores)
        return [list(itertools.islice(rest, len(job.prompts))) for job in jobs]
