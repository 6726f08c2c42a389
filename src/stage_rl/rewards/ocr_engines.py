"""OCR engines behind one call; free of torch, so that worker processes start fast and small."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stage_rl.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

DETECTION_SIDE = 960
"""Pixels above which the longer side is scaled down to find lines, as PaddleOCR does."""


@dataclass(frozen=True)
class Line:
    """One line of text that an engine read."""

    text: str
    confidence: float
    """In [0, 1]."""


class OcrReader(Protocol):
    """Reads pictures."""

    def read(self, pictures: Sequence[Picture]) -> list[list[Line]]:
        """The lines of each picture (H x W x 3, uint8, blue first) in reading order."""
        ...


class RapidOcr:
    """RapidOCR on ONNX Runtime. Its models come with its wheel: nothing is downloaded."""

    def __init__(self, *, threads: int = 1) -> None:
        _require("rapidocr", "onnxruntime", extra="ocr")
        from rapidocr import RapidOCR

        runtime = "EngineConfig.onnxruntime"
        self._engine: Any = RapidOCR(
            params={
                "Global.text_score": 0.0,  # the reward has a threshold of its own
                "Global.use_cls": False,  # no text upside down, as the released code
                "Global.log_level": "error",  # an image without text is no warning
                "Det.limit_side_len": DETECTION_SIDE,
                "Det.limit_type": "max",
                f"{runtime}.intra_op_num_threads": threads,
                f"{runtime}.inter_op_num_threads": 1,
            }
        )

    def read(self, pictures: Sequence[Picture]) -> list[list[Line]]:
        """The lines of each picture."""
        results = (self._engine(picture) for picture in pictures)
        # Both are None where nothing was found.
        return [_lines(result.txts or (), result.scores or ()) for result in results]


class PaddleOcr:
    """PaddleOCR 2 or 3, installed by the user; it downloads its models on first use."""

    def __init__(self, *, language: str = "en", threads: int = 1) -> None:
        _require("paddleocr", "paddle", extra=None)
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]

        self._is_old = importlib.metadata.version("paddleocr").startswith("2.")
        options: dict[str, Any] = {"lang": language}
        if self._is_old:
            options |= {"use_angle_cls": False, "use_gpu": False, "show_log": False}
        else:
            options |= {"use_textline_orientation": False, "use_doc_unwarping": False}
            options |= {"use_doc_orientation_classify": False, "device": "cpu"}
        self._engine: Any = PaddleOCR(cpu_threads=threads, **options)

    def read(self, pictures: Sequence[Picture]) -> list[list[Line]]:
        """The lines of each picture."""
        return [self._read_one(picture) for picture in pictures]

    def _read_one(self, picture: Picture) -> list[Line]:
        if self._is_old:
            # A list of pages, each a list of (box, (text, confidence)), or None without text.
            (page,) = self._engine.ocr(picture, cls=False)
            return [Line(text, float(confidence)) for _, (text, confidence) in page or ()]
        (page,) = self._engine.predict(picture)
        return _lines(page["rec_texts"], page["rec_scores"])


def _lines(texts: Sequence[str], confidences: Sequence[float]) -> list[Line]:
    pairs = zip(texts, confidences, strict=True)
    return [Line(text, float(confidence)) for text, confidence in pairs]


def _require(*modules: str, extra: str | None) -> None:
    """An InputError that says what to install where a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        what = f"'stage-rl[{extra}]'" if extra else "paddleocr paddlepaddle"
        raise InputError(f"reward 'ocr': {missing[0]} is not installed; run pip install {what}")
