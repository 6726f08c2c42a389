"""GenEval prompts and their metadata: the official builder.

Everything is generic over a `Vocabulary`, so that another world of objects (other classes behind
another detector) gets prompts of the same wording and the same metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]
"""One line of GenEval metadata: tag, include, perhaps exclude, prompt."""

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
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


GENEVAL = Vocabulary(CLASSES, uncolored="person")


def with_article(words: str) -> str:
    """Words with a or an, by their first letter alone, as in the official prompts."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    """The plural as the official prompts spell it: +es after s, else +s (benchs, sheeps)."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def single_object_record(name: str) -> Record:
    """A photo of a NAME."""
    return _record("single_object", [{"class": name, "count": 1}], with_article(name))


def two_object_record(a: str, b: str) -> Record:
    """A photo of an A and a B."""
    include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
    return _record("two_object", include, f"{with_article(a)} and {with_article(b)}")


def counting_record(name: str, count: int) -> Record:
    """A photo of COUNT (2 to 10) NAMEs; one more is excluded."""
    assert 2 <= count < len(NUMBERS)
    include = [{"class": name, "count": count}]
    record = _record("counting", include, f"{NUMBERS[count]} {plural(name)}")
    prompt = record.pop("prompt")
    return {**record, "exclude": [{"class": name, "count": count + 1}], "prompt": prompt}


def colors_record(color: str, name: str) -> Record:
    """A photo of a COLOR NAME."""
    include = [{"class": name, "count": 1, "color": color}]
    return _record("colors", include, f"{with_article(color)} {name}")


def position_record(a: str, relation: str, b: str) -> Record:
    """A photo of an A RELATION a B; the clause of B comes first, that of A points to it."""
    include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
    return _record("position", include, f"{with_article(a)} {relation} {with_article(b)}")


def color_attr_record(first: tuple[str, str], second: tuple[str, str]) -> Record:
    """A photo of a COLOR NAME and a COLOR NAME; each argument is (color, name)."""
    include = [{"class": name, "count": 1, "color": color} for color, name in (first, second)]
    words = [f"{with_article(color)} {name}" for color, name in (first, second)]
    return _record("color_attr", include, " and ".join(words))


def _record(tag: str, include: list[dict[str, Any]], words: str) -> Record:
    return {"tag": tag, "include": include, "prompt": f"a photo of {words}"}


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
    records = [single_object_record(classes[place]) for place in order]
    for task in TASKS[1:]:
        records += [_draw(task, rng, vocabulary) for _ in range(num_per_task)]
    return list({json.dumps(record): record for record in records}.values())


def _draw(task: str, rng: np.random.Generator, vocabulary: Vocabulary) -> Record:
    """One random record. The order of the draws is the official one, on which the seed depends."""

    def one(words: tuple[str, ...]) -> str:
        return words[rng.choice(len(words))]

    def two(words: tuple[str, ...]) -> tuple[str, str]:
        a, b = rng.choice(len(words), size=2, replace=False)
        return words[a], words[b]

    match task:
        case "two_object":
            return two_object_record(*two(vocabulary.classes))
        case "counting":
            name = one(vocabulary.classes)
            return counting_record(name, int(rng.integers(2, vocabulary.max_count, endpoint=True)))
        case "colors":
            name = one(vocabulary.colored)
            return colors_record(one(vocabulary.colors), name)
        case "position":
            a, b = two(vocabulary.classes)
            return position_record(a, one(vocabulary.relations), b)
        case "color_attr":
            names, colors = two(vocabulary.colored), two(vocabulary.colors)
            return color_attr_record((colors[0], names[0]), (colors[1], names[1]))
    raise AssertionError(task)
