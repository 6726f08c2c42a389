"""GenEval prompts: records and their check, the evaluation set, training mixes, their settings.

Everything is generic over a `Vocabulary`, so that another world of objects (other classes behind
another detector) gets prompts of the same wording and the same metadata.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, model_validator

from stage_rl.errors import InputError, RecipeError
from stage_rl.prompts.files import (
    OneSourceConfig,
    Record,
    as_prompts,
    drop_none,
    known,
    read_prompts,
    whole,
    word,
)
from stage_rl.settings import Settings, validation_error
from stage_rl.types import Prompt

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

RELATIONS = tuple(INVERSE)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog"),
    *("horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella"),
    *("handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite"),
    *("baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle"),
    *("wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich"),
    *("orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse"),
    *("tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier"),
    "toothbrush",
)
"""The 80 class names in the order of the detector's outputs (COCO order, three of them renamed)."""

MIXES: Mapping[str, Mapping[str, float]] = {
    "stage": dict(zip(TASKS, (0, 1, 7, 1, 4, 5), strict=True)),
    "flow_grpo": dict(zip(TASKS, (0, 1, 5, 1, 7, 3), strict=True)),
}
"""Training ratios by task: of the STAGE paper (appendix B.1) and of Flow-GRPO."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that prompts are made of."""

    classes: tuple[str, ...]
    colors: tuple[str, ...] = COLORS
    relations: tuple[str, ...] = RELATIONS
    uncolored: str | None = None
    """A class that no prompt gives a colour."""
    max_count: int = 4

    @property
    def colored(self) -> tuple[str, ...]:
        """The classes that may have a colour, in the order the official builder counts them."""
        if self.uncolored is None:
            return self.classes
        place = self.classes.index(self.uncolored)
        return self.classes[place + 1 :] + self.classes[:place]

    def choices(self, task: str) -> tuple[tuple[tuple[Any, ...], int], ...]:
        """What a prompt of a task chooses from, and how many different ones of each.

        In the order of the official builder's draws, on which its seeds depend.
        """
        counts = tuple(range(2, self.max_count + 1))
        return {
            "single_object": ((self.classes, 1),),
            "two_object": ((self.classes, 2),),
            "counting": ((self.classes, 1), (counts, 1)),
            "colors": ((self.colored, 1), (self.colors, 1)),
            "position": ((self.classes, 2), (self.relations, 1)),
            "color_attr": ((self.colored, 2), (self.colors, 2)),
        }[task]


GENEVAL = Vocabulary(CLASSES, uncolored="person")


def make_record(task: str, *chosen: Any) -> Record:
    """The record of a task from its `Vocabulary.choices`, in the official builder's wording.

    One more of a counted class is excluded. Of a position "A left of B" the clause of B comes
    first, that of A points to it.
    """

    def thing(name: str, **more: Any) -> dict[str, Any]:
        return {"class": name, "count": 1, **more}

    match task, chosen:
        case "single_object", (name,):
            return photo_record(task, [thing(name)], with_article(name))
        case "two_object", (a, b):
            words = f"{with_article(a)} and {with_article(b)}"
            return photo_record(task, [thing(a), thing(b)], words)
        case "counting", (name, count):
            words = f"{NUMBERS[count]} {plural(name)}"
            exclude = [{"class": name, "count": count + 1}]
            return photo_record(task, [thing(name, count=count)], words, exclude=exclude)
        case "colors", (name, color):
            return photo_record(task, [thing(name, color=color)], f"{with_article(color)} {name}")
        case "position", (a, b, relation):
            words = f"{with_article(a)} {relation} {with_article(b)}"
            return photo_record(task, [thing(b), thing(a, position=[relation, 0])], words)
        case "color_attr", (a, b, color_a, color_b):
            words = f"{with_article(color_a)} {a} and {with_article(color_b)} {b}"
            return photo_record(task, [thing(a, color=color_a), thing(b, color=color_b)], words)
    raise AssertionError(task)


def photo_record(tag: str, include: list[dict[str, Any]], words: str, **more: Any) -> Record:
    """A photo of WORDS, with its clauses."""
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {words}"}


def with_article(words: str) -> str:
    """Words with a or an, by their first letter alone, as in the official prompts."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    """The plural as the official prompts spell it: +es after s, else +s (benchs, sheeps)."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def validate_metadata(
    record: Mapping[str, Any], where: str, vocabulary: Vocabulary | None = None
) -> Record:
    """GenEval metadata ready to judge by: None dropped, numbers cast; else an `InputError`.

    Whoever passes metadata through a table gets None for absent keys and numbers as strings; both
    mean what they meant before. With a vocabulary, other classes and colours are refused. Further
    keys beside tag, include and exclude are kept.
    """
    cleaned = drop_none(record)
    known(cleaned.get("tag"), TASKS, f"{where}: tag")
    if not cleaned.get("include"):
        raise InputError(f"{where}: include: no clause; write [{{'class': 'dog', 'count': 1}}]")
    keys = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}
    for key in keys.keys() & cleaned.keys():
        if not isinstance(cleaned[key], list):
            raise InputError(f"{where}: {key}: not a list of clauses")
        for i, clause in enumerate(cleaned[key]):
            _clean_clause(clause, f"{where}: {key}.{i}", keys[key], i, vocabulary)
    return cleaned


def _clean_clause(
    clause: Any, where: str, keys: tuple[str, ...], place: int, vocabulary: Vocabulary | None
) -> None:
    if not isinstance(clause, dict):
        raise InputError(f"{where}: not a clause; write {{'class': 'dog', 'count': 1}}")
    for key in clause:
        known(key, keys, f"{where}: key")
    words = {"class": vocabulary and vocabulary.classes, "color": vocabulary and vocabulary.colors}
    for key, allowed in words.items():
        if key == "class" or key in clause:
            word(clause.get(key), f"{where}.{key}")
            if allowed is not None:
                known(clause[key], allowed, f"{where}.{key}")
    clause["count"] = whole(clause.get("count"), f"{where}.count", minimum=1)
    if "position" in clause:
        clause["position"] = _position(clause["position"], f"{where}.position", place)


def _position(value: Any, where: str, place: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{where}: {value!r}; write [relation, index of an earlier clause]")
    relation, target = value[0], whole(value[1], where)
    known(relation, RELATIONS, where)
    if not 0 <= target < place:
        earlier = f"one of 0 to {place - 1}" if place else "no clause comes before this one"
        raise InputError(f"{where}: index {target} is not an earlier include clause; {earlier}")
    return [relation, target]


def geneval_prompts(
    seed: int = 43, num_per_task: int = 100, *, vocabulary: Vocabulary = GENEVAL
) -> list[Record]:
    """The official evaluation prompts: every class once, then `num_per_task` draws of each task.

    A record that was drawn before is dropped, so a task may have fewer. Seed 43 with 100 per task
    gives the 553 published records.
    """
    rng = np.random.default_rng(seed)
    classes = vocabulary.classes
    order = rng.choice(len(classes), size=len(classes), replace=False)
    records = [make_record("single_object", classes[place]) for place in order]
    for task in TASKS[1:]:
        for _ in range(num_per_task):
            chosen: list[Any] = []
            for words, number in vocabulary.choices(task):
                if number == 1:  # not a draw of size 1 without replacement, which takes other bits
                    chosen.append(words[rng.choice(len(words))])
                else:
                    places = rng.choice(len(words), size=number, replace=False)
                    chosen += [words[place] for place in places]
            records.append(make_record(task, *chosen))
    return list({json.dumps(record): record for record in records}.values())


def content_of(metadata: Mapping[str, Any]) -> Any:
    """What a GenEval record asks for, whatever its order of words; None without clauses.

    "A left of B" and "B right of A" ask for the same. What else the record holds, such as the
    background of a prompt of the shapes world, counts as well.
    """
    if not metadata.get("include"):
        return None
    clauses = metadata["include"]
    objects = sorted((one["class"], one["count"], one.get("color", "")) for one in clauses)
    relations = sorted(
        _relation(one, clauses[one["position"][1]]) for one in clauses if "position" in one
    )
    others = sorted(
        (key, str(value))
        for key, value in metadata.items()
        if key not in ("tag", "include", "exclude", "prompt")
    )
    return tuple(objects), tuple(relations), tuple(others)


def _relation(clause: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, str, str]:
    relation = clause["position"][0]
    a, b = clause["class"], target["class"]
    return min((a, relation, b), (b, INVERSE[relation], a))


def num_records(task: str, vocabulary: Vocabulary = GENEVAL) -> int:
    """How many distinct prompts a task has."""
    return math.prod(_sizes(task, vocabulary))


def record_at(task: str, place: int, vocabulary: Vocabulary = GENEVAL) -> Record:
    """The record at a place in [0, `num_records`); every prompt of the task has one place."""
    digits = iter(np.unravel_index(place, _sizes(task, vocabulary)))
    chosen: list[Any] = []
    for words, number in vocabulary.choices(task):
        first = int(next(digits))
        chosen.append(words[first])
        if number == 2:
            second = int(next(digits))
            chosen.append(words[second + (second >= first)])
    return make_record(task, *chosen)


def _sizes(task: str, vocabulary: Vocabulary) -> list[int]:
    return [
        len(words) - taken for words, number in vocabulary.choices(task) for taken in range(number)
    ]


class TaskRatios(Settings):
    """How many prompts of each task, in proportion."""

    single_object: NonNegativeFloat = 0.0
    two_object: NonNegativeFloat = 0.0
    counting: NonNegativeFloat = 0.0
    colors: NonNegativeFloat = 0.0
    position: NonNegativeFloat = 0.0
    color_attr: NonNegativeFloat = 0.0


class GenEvalPromptsConfig(OneSourceConfig):
    """GenEval training prompts, built in a ratio of tasks or read from a file."""

    sources = ("mix", "ratios", "path")
    vocabulary: ClassVar[Vocabulary] = GENEVAL
    """The words of the mix, and those that a file may use."""

    mix: Literal["stage", "flow_grpo"] | None = None
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    ratios: TaskRatios | None = None
    """Ratios of one's own, in place of `mix`."""
    path: str | None = None
    """A file in place of a mix: .jsonl with GenEval metadata, or one prompt per line."""
    num_prompts: int = Field(default=50_000, gt=0, le=1_000_000)
    """Prompts of a mix; no evaluation prompt is among them."""
    seed: int = Field(default=0, ge=0)
    """Seed of a mix."""

    @model_validator(mode="after")
    def _some_ratio(self) -> Self:
        if self.ratios is not None and not any(self.ratios.model_dump().values()):
            raise validation_error("ratios", "all are 0; give at least one task a positive ratio")
        return self

    def held_out(self, record: Record) -> bool:
        """Whether a mix may not ask for what a record asks for, in its words or in others."""
        return content_of(record) in _evaluated()

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order; a file with a fault is an `InputError`."""
        if self.path is not None:
            placed = enumerate(read_prompts(Path(self.path)))
            return tuple(
                Prompt(text, i, record and validate_metadata(record, where, self.vocabulary), where)
                for i, (where, text, record) in placed
            )
        return as_prompts(self._mix())

    def _mix(self) -> list[Record]:
        """Shuffled records in the ratio of the tasks, none of them held out.

        A task draws distinct prompts as long as there are any and then repeats them evenly:
        counting has only 240 prompts, so a useful mix has to repeat them.
        """
        ratios = MIXES[self.mix] if self.mix else self.ratios.model_dump() if self.ratios else {}
        records: list[Record] = []
        for task, count in _shares(ratios, self.num_prompts).items():
            # A generator per task: a change of one ratio leaves the other tasks as they are.
            rng = np.random.default_rng((self.seed, TASKS.index(task)))
            places = rng.permutation(num_records(task, self.vocabulary))
            drawn = (record_at(task, int(place), self.vocabulary) for place in places)
            allowed = (record for record in drawn if not self.held_out(record))
            distinct = list(itertools.islice(allowed, count))
            if count and not distinct:
                raise RecipeError(
                    f"training mix: {task}: every prompt is an evaluation prompt; "
                    "set its ratio to 0"
                )
            records += [distinct[i % len(distinct)] for i in range(count)]
        order = np.random.default_rng((self.seed, len(TASKS))).permutation(self.num_prompts)
        return [records[place] for place in order]


def _shares(ratios: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` split by largest remainder; of equal remainders the earlier task goes first."""
    whole_ratio = sum(ratios.values())
    quotas = {task: total * ratios[task] / whole_ratio for task in TASKS if task in ratios}
    shares = {task: math.floor(quota) for task, quota in quotas.items()}
    by_remainder = sorted(shares, key=lambda task: shares[task] - quotas[task])
    for task in by_remainder[: total - sum(shares.values())]:
        shares[task] += 1
    return shares


@functools.cache
def _evaluated() -> frozenset[Any]:
    return frozenset(content_of(record) for record in geneval_prompts())
