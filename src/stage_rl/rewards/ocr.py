"""The OCR reward: how much of the text that a prompt quotes can be read in its image.

The score of github.com/yifan123/flow_grpo, which STAGE uses too.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field, PositiveInt
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.rewards.base import IMAGE_SIZE, ReferenceCase, RewardConfig, Score
from stage_rl.types import Prompt

Compat = Literal["fixed", "release"]

Picture = NDArray[np.uint8]
"""H x W x 3, blue first."""


class OcrRewardConfig(RewardConfig):
    """How much of the text that a prompt quotes can be read in its image."""

    engine: Literal["rapidocr", "paddleocr"] = "rapidocr"
    """What reads: rapidocr has its models with it; paddleocr is the released code's."""
    language: str = "en"
    """Language of PaddleOCR's model; RapidOCR's reads Latin and Chinese script."""
    compat: Compat = "fixed"
    """release: the engine is given red in the place of blue."""
    allow_more: bool = True
    """A target inside a longer text scores 1, as released; false: as in the paper."""
    min_confidence: float = Field(default=0.0, ge=0, lt=1)
    """Confidence above which a line counts."""
    turned: bool = False
    """Lines upside down are turned before they are read; the released code reads none."""
    processes: PositiveInt = 1
    """Processes that read, each with an engine of its own; 1: the trainer's."""
    threads: PositiveInt = 1
    """Threads of one engine."""

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """Also that a prompt has no text to be read."""
        try:
            target_of(prompt)
        except ValueError as error:
            return str(error)
        return super().unsupported_reason(prompt)

    def missing(self) -> tuple[str, ...]:
        """The package of the engine."""
        if importlib.util.find_spec(self.engine) is not None:
            return ()
        extra = " (pip install 'stage-rl[ocr]')" if self.engine == "rapidocr" else ""
        return (f"package {self.engine}{extra}",)

    def build(self, device: torch.device) -> OcrReward:
        """The reward with its engine, on the CPU; an InputError where that is not installed."""
        how: dict[str, Any] = {"threads": self.threads, "turned": self.turned}
        make = functools.partial(rapidocr, **how)
        if self.engine == "paddleocr":
            make = functools.partial(paddleocr, language=self.language, **how)
        read = make() if self.processes == 1 else ParallelReader(make, self.processes)
        return OcrReward(read, self.compat, self.min_confidence, self.allow_more)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Words that can be read against their strokes in disorder."""
        return tuple(
            ReferenceCase(
                Prompt(f'a sign that says "{word}"', index),
                text_image(word),
                garbled(text_image(word)),
                f"'{word}' against its strokes in disorder",
            )
            for index, word in enumerate(("STAGE", "Open Today"))
        )


@dataclass(frozen=True)
class OcrReward:
    """Reads images with an engine and compares what it reads with the prompts' targets."""

    reader: Reader
    compat: Compat = "fixed"
    min_confidence: float = 0.0
    allow_more: bool = True

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; a prompt without a target is a ValueError."""
        targets = [target_of(prompt) for prompt in prompts]
        # Engines take blue first. The released code hands them red first.
        channels = images_NHWC if self.compat == "release" else images_NHWC.flip(-1)
        pages = self.reader(list(channels.contiguous().numpy()))
        scores = []
        for lines, target in zip(pages, targets, strict=True):
            text = text_of(lines, self.min_confidence)
            value = similarity(text, target, allow_more=self.allow_more)
            replies = tuple(line.text for line in lines if line.confidence > self.min_confidence)
            scores.append(Score(value, f"reads '{text}' for '{target}'", replies=replies))
        return scores


def text_of(lines: Sequence[Line], min_confidence: float = 0.0) -> str:
    """The lines above a confidence in the engine's order, with nothing between them."""
    return "".join(line.text for line in lines if line.confidence > min_confidence)


def target_of(prompt: Prompt) -> str:
    """The text to be read: `metadata['target']`, else what stands in the first double quotes.

    A ValueError where there is none, or nothing but spaces.
    """
    target = prompt.metadata.get("target")
    if target is None:
        parts = prompt.text.split('"')
        if len(parts) < 3:
            raise ValueError('needs a text in double quotes or a "target" in the metadata')
        target = parts[1]
    if not _plain(target):
        raise ValueError("needs a text to be read, and the quoted one is empty")
    return target


def similarity(text: str, target: str, *, allow_more: bool = True) -> float:
    """1 - edit distance / length of the target, at least 0, spaces and capitals left aside.

    A target that stands whole inside a longer text scores 1, as released; without `allow_more`
    every further letter is an error, as in the paper.
    """
    text, target = _plain(text), _plain(target)
    if allow_more and target in text:
        return 1.0
    return 1 - min(edit_distance(text, target), len(target)) / len(target)


def edit_distance(a: str, b: str) -> int:
    """The least number of letters to insert, delete or replace that turns a into b."""
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (letter != other)))
        above = row
    return above[-1]


def _plain(text: str) -> str:
    return text.replace(" ", "").lower()


@dataclass(frozen=True)
class Line:
    """One line of text that an engine read."""

    text: str
    confidence: float
    """In [0, 1]."""


Reader = Callable[[Sequence[Picture]], list[list[Line]]]
"""The lines of each picture in reading order."""


def engine_name(engine: str) -> str:
    """An engine with its major version, such as `paddleocr 2`; without, if it is not installed."""
    try:
        return f"{engine} {importlib.metadata.version(engine).partition('.')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return engine


def rapidocr(*, threads: int = 1, turned: bool = False) -> Reader:
    """RapidOCR on ONNX Runtime. Its models come with its wheel: nothing is downloaded."""
    _require("rapidocr", "onnxruntime", extra="ocr")
    from rapidocr import RapidOCR

    engine: Any = RapidOCR(
        params={
            "Global.text_score": 0.0,  # the reward has a threshold of its own
            "Global.use_cls": turned,
            "Global.log_level": "error",  # an image without text is no warning
            "Det.limit_side_len": 960,  # a longer side is scaled down, as PaddleOCR does
            "Det.limit_type": "max",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )

    def read(picture: Picture) -> list[Line]:
        result = engine(picture)
        # Both are None where nothing was found.
        return _lines(result.txts or (), result.scores or ())

    return lambda pictures: [read(picture) for picture in pictures]


def paddleocr(*, language: str = "en", threads: int = 1, turned: bool = False) -> Reader:
    """PaddleOCR 2 or 3, installed by the user; it downloads its models on first use."""
    _require("paddleocr", "paddle", extra=None)
    from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"lang": language, "cpu_threads": threads}
    if engine_name("paddleocr") == "paddleocr 2":
        engine = PaddleOCR(use_angle_cls=turned, use_gpu=False, show_log=False, **options)

        def read(picture: Picture) -> list[Line]:
            # A list of pages, each a list of (box, (text, confidence)), or None without text.
            (page,) = engine.ocr(picture, cls=turned)
            return [Line(text, float(confidence)) for _, (text, confidence) in page or ()]

    else:
        options |= {"use_textline_orientation": turned, "use_doc_unwarping": False}
        engine = PaddleOCR(use_doc_orientation_classify=False, device="cpu", **options)

        def read(picture: Picture) -> list[Line]:
            (page,) = engine.predict(picture)
            return _lines(page["rec_texts"], page["rec_scores"])

    return lambda pictures: [read(picture) for picture in pictures]


def _lines(texts: Sequence[str], confidences: Sequence[float]) -> list[Line]:
    return [Line(text, float(share)) for text, share in zip(texts, confidences, strict=True)]


def _require(*modules: str, extra: str | None) -> None:
    """An InputError that says what to install where a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        what = f"'stage-rl[{extra}]'" if extra else "paddleocr paddlepaddle"
        raise InputError(f"reward 'ocr': {missing[0]} is not installed; run pip install {what}")


class ParallelReader:
    """A reader whose pictures are read by several processes, each with an engine of its own."""

    def __init__(self, make: Callable[[], Reader], processes: int) -> None:
        self._make = make
        self._processes = processes
        self._executor: ProcessPoolExecutor | None = None

    def __call__(self, pictures: Sequence[Picture]) -> list[list[Line]]:
        """The lines of each picture; a RuntimeError where a worker died, new ones follow."""
        self._executor = self._executor or ProcessPoolExecutor(
            self._processes,
            # A fork would copy the trainer's threads and GPU as they are.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._make,),
        )
        # One picture a task: pictures differ in how long they take.
        try:
            return list(self._executor.map(_read_one, pictures))
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


_reader: Reader | None = None
"""The engine of a worker process; there is none in the trainer's own."""


def _begin(make: Callable[[], Reader]) -> None:
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


def _read_one(picture: Picture) -> list[Line]:
    assert _reader is not None, "not in a worker process"
    return _reader([picture])[0]


def text_image(text: str, *, size: int = IMAGE_SIZE) -> Image.Image:
    """A text in one line across the middle of a white image, as large as fits up to an eighth."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=size / 8)
    width = draw.textlength(text, font=font)
    if width > 0.9 * size:
        font = ImageFont.load_default(size=size / 8 * 0.9 * size / width)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    place = ((size - right - left) / 2, (size - bottom - top) / 2)
    draw.text(place, text, font=font, fill="black")
    return image


def garbled(image: Image.Image) -> Image.Image:
    """An image whose 48 upright strips are in another order: strokes, no letters."""
    strip = image.width // 48
    mixed = Image.new("RGB", image.size, "white")
    for place in range(48):
        source = place * 19 % 48 * strip  # 19 has no divisor in common
        mixed.paste(image.crop((source, 0, source + strip, image.height)), (place * strip, 0))
    return mixed
