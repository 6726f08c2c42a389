"""The OCR reward: how much of the text that a prompt quotes can be read in its image.

github.com/yifan123/flow_grpo, whose score STAGE uses too. Shape suffixes: N images, H x W pixels,
C colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stage_rl.rewards.base import Score
from stage_rl.rewards.ocr_engines import Line, OcrReader

if TYPE_CHECKING:
    from torch import Tensor

    from stage_rl.types import Prompt

Compat = Literal["fixed", "release"]


@dataclass(frozen=True)
class OcrReward:
    """Reads images with an engine and compares what it reads with the prompts' targets."""

    reader: OcrReader
    compat: Compat = "fixed"
    min_confidence: float = 0.0
    allow_more: bool = True

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; a prompt without a target is a ValueError."""
        targets = [target_of(prompt) for prompt in prompts]
        # Engines take blue first. The released code hands them red first.
        channels = images_NHWC if self.compat == "release" else images_NHWC.flip(-1)
        pages = self.reader.read(list(channels.contiguous().numpy()))
        scores = []
        for lines, target in zip(pages, targets, strict=True):
            text = text_of(lines, self.min_confidence)
            value = similarity(text, target, allow_more=self.allow_more)
            scores.append(Score(value, f"reads '{text}' for '{target}'"))
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
