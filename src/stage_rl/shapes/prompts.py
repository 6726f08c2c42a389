"""The prompts of the shapes world: for pretraining, for training by reward, and held out.

All use GenEval's wording and metadata. Beyond GenEval's keys a record may carry `size` of its
objects and `tone` and `texture` of its background, which only the renderer reads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from stage_rl.prompts.files import Record
from stage_rl.prompts.geneval import (
    NUMBERS,
    TASKS,
    GenEvalPromptsConfig,
    Vocabulary,
    content_of,
    make_record,
    num_records,
    photo_record,
    plural,
    record_at,
    with_article,
)
from stage_rl.shapes.scenes import COLORS, SHAPES, SIZES, TEXTURES, TONES, UNSEEN_PAIRS, seen_colors

VOCABULARY = Vocabulary(SHAPES, tuple(COLORS))

WORDS = (
    *("a", "an", "photo", "of", "and", "on", "background"),
    *("left", "right", "above", "below"),
    *NUMBERS[2:5],
    *SHAPES,
    *(plural(shape) for shape in SHAPES),
    *COLORS,
    *TONES,
    *TEXTURES,
    *SIZES,
)
"""Every word that occurs in a prompt."""

PRETRAINING_SHARES = {
    "single_object": 0.06,
    "two_object": 0.17,
    "counting": 0.15,
    "colors": 0.08,
    "position": 0.20,
    "color_attr": 0.24,
    "retention": 0.10,
}

SWAPPED_COLORS = 0.1
"""Share of captions with two colours that name them the wrong way round."""

MISCOUNTED = 0.1
"""Share of counting captions with another number. Both kinds are 3 of 100 captions."""

EVALUATION_SIZES = dict(zip(TASKS, (8, 24, 12, 24, 48, 48), strict=True))
"""Evaluation prompts per task, out of 8, 56, 24, 72, 224 and several thousand."""

_SPLIT_SEED = 43


def names_unseen_pair(record: Mapping[str, Any]) -> bool:
    """Whether a record asks for a class in a colour that training images never show."""
    return any((c["class"], c.get("color")) in UNSEEN_PAIRS for c in record["include"])


@functools.cache
def evaluation_records() -> tuple[Record, ...]:
    """The GenEval prompts that training by reward never sees, task by task."""
    chosen: list[Record] = []
    for task, size in EVALUATION_SIZES.items():
        rng = np.random.default_rng((_SPLIT_SEED, TASKS.index(task)))
        places = rng.permutation(num_records(task, VOCABULARY))
        records = (record_at(task, int(place), VOCABULARY) for place in places)
        seen = (record for record in records if not names_unseen_pair(record))
        chosen += itertools.islice(seen, size)
    return tuple(chosen)


@functools.cache
def _evaluated() -> frozenset[Any]:
    """What the evaluation asks for, but for the eight single objects, which both sets have."""
    tagged = (record for record in evaluation_records() if record["tag"] != "single_object")
    return frozenset(content_of(record) for record in tagged)


def pretraining_record(rng: np.random.Generator) -> Record:
    """A caption for the base policy: single objects to two bound colours, some with background."""
    task = str(rng.choice(list(PRETRAINING_SHARES), p=list(PRETRAINING_SHARES.values())))
    if task == "retention":
        return retention_record(rng)
    while True:
        place = int(rng.integers(num_records(task, VOCABULARY)))
        record = record_at(task, place, VOCABULARY)
        if not names_unseen_pair(record):
            return record


def pretraining_caption(record: Record, rng: np.random.Generator) -> str:
    """What a record's picture is called in pretraining; some colours and numbers are wrong.

    A policy that has read such captions binds and counts worse than it could, as large models do.
    """
    drawn, tag = rng.uniform(), record["tag"]
    if tag == "color_attr" and drawn < SWAPPED_COLORS:
        one, other = record["include"]
        swapped = make_record(tag, one["class"], other["class"], other["color"], one["color"])
        return record["prompt"] if names_unseen_pair(swapped) else swapped["prompt"]
    if tag == "counting" and drawn < MISCOUNTED:
        (clause,) = record["include"]
        others = [n for n in range(2, VOCABULARY.max_count + 1) if n != clause["count"]]
        return make_record("counting", clause["class"], int(rng.choice(others)))["prompt"]
    return record["prompt"]


def retention_record(rng: np.random.Generator) -> Record:
    """A caption that names a size or a background: known from pretraining, never rewarded."""
    shape = str(rng.choice(SHAPES))
    color = str(rng.choice(seen_colors(shape)))
    clause = {"class": shape, "count": 1, "color": color}
    kinds = {"size": SIZES, "tone": TONES, "texture": TEXTURES}
    kind = list(kinds)[rng.integers(3)]
    value = str(rng.choice(list(kinds[kind])))
    words = f"{with_article(color)} {shape} on a {value} background"
    if kind == "size":
        words = f"a {value} {color} {shape}"
    return {**photo_record("colors", [clause], words), kind: value}


def transfer_record(rng: np.random.Generator) -> Record:
    """A caption of a kind that neither pretraining nor training by reward contains."""
    a, b, c = (str(shape) for shape in rng.choice(SHAPES, 3, replace=False))
    count = int(rng.integers(2, 4))
    match rng.integers(4):
        case 0:
            words = f"{with_article(a)} and {with_article(b)} and {with_article(c)}"
            clauses = [{"class": shape, "count": 1} for shape in (a, b, c)]
            return photo_record("two_object", clauses, words)
        case 1:
            color = str(rng.choice(seen_colors(a)))
            clause = {"class": a, "count": count, "color": color}
            return photo_record("color_attr", [clause], f"{NUMBERS[count]} {color} {plural(a)}")
        case 2:
            relation = str(rng.choice(VOCABULARY.relations))
            counted = {"class": a, "count": 2, "position": [relation, 0]}
            words = f"two {plural(a)} {relation} {with_article(b)}"
            return photo_record("position", [{"class": b, "count": 1}, counted], words)
        case _:
            shape, color = sorted(UNSEEN_PAIRS)[int(rng.integers(len(UNSEEN_PAIRS)))]
            clause = {"class": shape, "count": 1, "color": color}
            return photo_record("colors", [clause], f"{with_article(color)} {shape}")


@functools.cache
def held_out_sets() -> Mapping[str, tuple[Record, ...]]:
    """96 prompts each: retention (known from pretraining) and transfer (in neither training)."""
    makers = {"retention": retention_record, "transfer": transfer_record}
    sets: dict[str, tuple[Record, ...]] = {}
    for place, (name, make) in enumerate(makers.items()):
        rng = np.random.default_rng((_SPLIT_SEED, 100 + place))
        by_text: dict[str, Record] = {}
        while len(by_text) < 96:
            record = make(rng)
            by_text[record["prompt"]] = record
        sets[name] = tuple(by_text.values())
    return sets


class ShapesPromptsConfig(GenEvalPromptsConfig):
    """Prompts of the shapes world, in a ratio of the GenEval tasks or read from a file."""

    vocabulary = VOCABULARY

    mix: Literal["stage", "flow_grpo"] | None = "stage"
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    num_prompts: int = Field(default=512, gt=0, le=1_000_000)
    """Prompts of a mix, apart from all held-out ones; a task with fewer repeats them evenly."""

    @model_validator(mode="before")
    @classmethod
    def _another_source_replaces_the_mix(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mix" in data:
            return data
        others = (data.get("ratios"), data.get("path"))
        return data if others == (None, None) else {**data, "mix": None}

    def held_out(self, record: Record) -> bool:
        """Whether a record names an unseen pair, or asks for what an evaluation prompt asks for."""
        return names_unseen_pair(record) or content_of(record) in _evaluated()
