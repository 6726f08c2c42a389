"""Prompts of the shapes world in the form of every benchmark, to try the whole way in seconds.

With them every scorer is tiny and random: the figures mean nothing.

Shape suffixes: H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stage_rl.prompts.files import as_prompts
from stage_rl.prompts.geneval import TASKS, Record
from stage_rl.prompts.sets import CATEGORIES, HPS_STYLES, level_of
from stage_rl.rewards.base import RewardConfig
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from stage_rl.rewards.ocr import Line, OcrReward

PER_ROW = 2
"""Prompts of each row of a table."""
IMAGES_PER_PROMPT = 2
TASK_OF = {
    **dict.fromkeys(("color", "shape", "texture", "complex"), "color_attr"),
    **{"spatial": "position", "3d_spatial": "position", "numeracy": "counting"},
    "non_spatial": "two_object",
}
"""The kind of shapes prompt that a category of T2I-CompBench gets."""
PARTS = ("spatial", "action", "all")


def smoke_prompts(prompt_set: str) -> tuple[Prompt, ...]:
    """Two or three prompts for each row of a benchmark's table."""
    makers = {
        "geneval": _geneval,
        "t2i_compbench": _compbench,
        "hps": lambda: _labelled("style", HPS_STYLES),
        "drawbench": lambda: _labelled("category", ("Colors", "Counting")),
        "ocr": _ocr,
    }
    return as_prompts(makers[prompt_set]())


def _of_task(task: str, number: int = PER_ROW) -> list[Record]:
    from stage_rl.shapes.prompts import evaluation_records

    return [record for record in evaluation_records() if record["tag"] == task][:number]


def _geneval() -> list[Record]:
    return [record for task in TASKS for record in _of_task(task)]


def _labelled(key: str, labels: Sequence[str]) -> list[Record]:
    """Colour prompts, some for each label."""
    records = _of_task("colors", PER_ROW * len(labels))
    return [
        {"prompt": record["prompt"], key: labels[place // PER_ROW]}
        for place, record in enumerate(records)
    ]


def _ocr() -> list[Record]:
    """The prompts quote nothing; what is to be read is the name of the shape."""
    targets = [record["include"][0]["class"] for record in _of_task("single_object", 4)]
    return [
        {"prompt": record["prompt"], "target": target, "level": level_of(target)}
        for record, target in zip(_of_task("single_object", 4), targets, strict=True)
    ]


def _compbench() -> list[Record]:
    records: list[Record] = []
    for category in CATEGORIES:
        number = len(PARTS) if category == "complex" else PER_ROW
        for place, record in enumerate(_of_task(TASK_OF[category], number)):
            records.append(_annotated(record, category, PARTS[place % len(PARTS)]))
    return records


def _annotated(record: Record, category: str, part: str) -> Record:
    clauses = record["include"]
    nouns = [clause["class"] for clause in clauses]
    words = [f"a {clause.get('color', '')} {clause['class']}" for clause in clauses]
    annotated: dict[str, Any] = {"prompt": record["prompt"], "category": category, "nouns": nouns}
    annotated["attr_nouns"] = words
    if category == "complex":
        annotated["complex_part"] = part
    if category == "numeracy":
        annotated["numeracy_info"] = [
            {"obj_name": clause["class"], "num": clause["count"]} for clause in clauses
        ]
    if len(nouns) == 2:
        place = clauses[1].get("position", ["next to"])[0]
        locality = "in front of" if category == "3d_spatial" else place
        annotated["spatial_info"] = {"obj1": nouns[1], "obj2": nouns[0], "locality": locality}
    return annotated


class TinyOcrConfig(RewardConfig):
    """The OCR reward with a reader that makes up its text."""

    def build(self, device: torch.device) -> OcrReward:
        """The reward."""
        from stage_rl.rewards.ocr import OcrReward

        return OcrReward(_TinyReader())


@dataclass(frozen=True)
class _TinyReader:
    """Reads letters off the brightness of an image's columns."""

    letters: str = "abcdefghijklmnopqrstuvwxyz"

    def read(self, pictures: Sequence[NDArray[np.uint8]]) -> list[list[Line]]:
        """One line per picture."""
        from stage_rl.rewards.ocr import Line

        texts = []
        for picture_HWC in pictures:
            columns = np.array_split(picture_HWC.mean((0, 2)), 6)
            texts.append("".join(self.letters[int(c.mean()) % len(self.letters)] for c in columns))
        return [[Line(text, 1.0)] for text in texts]
