"""A smoke run: prompts of the shapes world in the form of every benchmark, and made-up scores.

It tries the whole way in seconds and without any download; the figures mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stage_rl.prompts.files import as_prompts
from stage_rl.prompts.geneval import TASKS, Record
from stage_rl.prompts.sets import CATEGORIES, HPS_STYLES, level_of
from stage_rl.rewards.base import Score
from stage_rl.settings import resolve
from stage_rl.types import Prompt

IMAGES = 2
"""Images of each prompt, or of each task where the benchmark counts by task."""
PER_ROW = 2
"""Prompts of each row of a table."""
TASK_OF = {
    **dict.fromkeys(("color", "shape", "texture", "complex"), "color_attr"),
    **{"spatial": "position", "3d_spatial": "position", "numeracy": "counting"},
    "non_spatial": "two_object",
}
"""The kind of shapes prompt that a category of T2I-CompBench gets."""
PARTS = ("spatial", "action", "all")


@dataclass(frozen=True)
class MadeUpReward:
    """Random scores in [0, 1) and verdicts that depend on scorer, image and prompt alone."""

    name: str
    verdicts: tuple[str, ...] = ()
    """Extras that are 0 or 1."""

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        scores = []
        for image_HWC, prompt in zip(images_NHWC, prompts, strict=True):
            text = f"{self.name} {prompt.text}".encode()
            digest = hashlib.sha256(image_HWC.numpy().tobytes() + text).digest()
            rng = np.random.default_rng(list(digest))
            extras = {name: float(rng.integers(2)) for name in self.verdicts}
            scores.append(Score(float(rng.random()), "made up", extras))
        return scores


def smoke_prompts(prompt_set: str) -> tuple[Prompt, ...]:
    """Two or three prompts for each row of the tables of a prompt set."""
    makers = {
        "geneval": lambda: [record for task in TASKS for record in _of_task(task)],
        "t2i_compbench": _compbench,
        "hps": lambda: _labelled("style", HPS_STYLES),
        "drawbench": lambda: _labelled("category", ("Colors", "Counting")),
        "ocr": _ocr,
    }
    return as_prompts(makers[prompt_set]())


def _of_task(task: str, number: int = PER_ROW) -> list[Record]:
    prompts = resolve("benchmark", "shapes-geneval").prompt_set.load()
    records = [{**prompt.metadata, "prompt": prompt.text} for prompt in prompts]
    return [record for record in records if record["tag"] == task][:number]


def _labelled(key: str, labels: Sequence[str]) -> list[Record]:
    """Colour prompts, some for each label."""
    records = _of_task("colors", PER_ROW * len(labels))
    return [
        {"prompt": record["prompt"], key: labels[place // PER_ROW]}
        for place, record in enumerate(records)
    ]


def _ocr() -> list[Record]:
    """The prompts quote nothing; what is to be read is the name of the shape."""
    records = []
    for record in _of_task("single_object", 4):
        target = record["include"][0]["class"]
        records.append({"prompt": record["prompt"], "target": target, "level": level_of(target)})
    return records


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
    annotated: dict[str, Any] = {
        "prompt": record["prompt"],
        "category": category,
        "nouns": nouns,
        "attr_nouns": [f"a {clause.get('color', '')} {clause['class']}" for clause in clauses],
    }
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
