"""GenEval prompts and their metadata: the official builder.

Everything is generic over a `Vocabulary`, so that another world of objects (other classes behind
another detector) gets prompts of the same wording and the same metadata.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stage_rl.errors import RecipeError

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


# Training prompts in a given ratio of the GenEval tasks, apart from the evaluation prompts.


MIXES: Mapping[str, Mapping[str, float]] = {
    "stage": dict(zip(TASKS, (0, 1, 7, 1, 4, 5), strict=True)),
    "flow_grpo": dict(zip(TASKS, (0, 1, 5, 1, 7, 3), strict=True)),
}
"""Training ratios by task: of the STAGE paper (appendix B.1) and of Flow-GRPO."""

INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def evaluation_texts() -> frozenset[str]:
    """The 553 evaluation prompts, and those that ask for the same with the objects swapped."""
    records = geneval_prompts()
    swapped = [swap_objects(record)["prompt"] for record in records if len(record["include"]) == 2]
    return frozenset([record["prompt"] for record in records] + swapped)


def swap_objects(record: Record) -> Record:
    """The record of two objects that names them in the other order and asks for the same."""
    one, other = record["include"]
    match record["tag"]:
        case "two_object":
            return two_object_record(other["class"], one["class"])
        case "color_attr":
            first, second = ((clause["color"], clause["class"]) for clause in (other, one))
            return color_attr_record(first, second)
        case "position":
            return position_record(one["class"], INVERSE[other["position"][0]], other["class"])
    raise AssertionError(record["tag"])


def space(task: str, vocabulary: Vocabulary = GENEVAL) -> tuple[int, ...]:
    """The sizes of a task's choices; their product is the number of distinct prompts."""
    classes, colored = len(vocabulary.classes), len(vocabulary.colored)
    colors = len(vocabulary.colors)
    return {
        "single_object": (classes,),
        "two_object": (classes, classes - 1),
        "counting": (classes, vocabulary.max_count - 1),
        "colors": (colored, colors),
        "position": (classes, classes - 1, len(vocabulary.relations)),
        "color_attr": (colored, colored - 1, colors, colors - 1),
    }[task]


def record_at(task: str, place: int, vocabulary: Vocabulary = GENEVAL) -> Record:
    """The record at a place in [0, product of `space`); every prompt of the task has one place."""
    choice = [int(i) for i in np.unravel_index(place, space(task, vocabulary))]

    def two(words: tuple[str, ...], i: int, j: int) -> tuple[str, str]:
        return words[i], words[j + (j >= i)]

    match task:
        case "single_object":
            return single_object_record(vocabulary.classes[choice[0]])
        case "two_object":
            return two_object_record(*two(vocabulary.classes, *choice))
        case "counting":
            return counting_record(vocabulary.classes[choice[0]], choice[1] + 2)
        case "colors":
            return colors_record(vocabulary.colors[choice[1]], vocabulary.colored[choice[0]])
        case "position":
            a, b = two(vocabulary.classes, *choice[:2])
            return position_record(a, vocabulary.relations[choice[2]], b)
        case "color_attr":
            names = two(vocabulary.colored, *choice[:2])
            colors = two(vocabulary.colors, *choice[2:])
            return color_attr_record((colors[0], names[0]), (colors[1], names[1]))
    raise AssertionError(task)


def training_mix(
    ratios: Mapping[str, float],
    num_prompts: int,
    *,
    seed: int,
    exclude: Collection[str],
    vocabulary: Vocabulary = GENEVAL,
) -> list[Record]:
    """`num_prompts` shuffled records in the given ratio of tasks, none with an excluded text.

    Shares are rounded by largest remainder. A task draws distinct prompts as long as there are any
    and then repeats them evenly: counting has only 240 prompts, so a useful mix has to repeat them.
    """
    excluded = frozenset(exclude)
    records: list[Record] = []
    for task, count in _shares(ratios, num_prompts).items():
        # A generator per task: a change of one ratio does not redraw the other tasks.
        rng = np.random.default_rng((seed, TASKS.index(task)))
        distinct = _distinct(task, count, rng, excluded=excluded, vocabulary=vocabulary)
        if count and not distinct:
            raise RecipeError(
                f"training mix: {task}: every prompt is an evaluation prompt; set its ratio to 0"
            )
        records += [distinct[i % len(distinct)] for i in range(count)]
    order = np.random.default_rng((seed, len(TASKS))).permutation(num_prompts)
    return [records[place] for place in order]


def _shares(ratios: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` split by largest remainder; of equal remainders the earlier task goes first."""
    if total < 1:
        raise RecipeError(f"training mix: num_prompts is {total}; write at least 1")
    for task, ratio in ratios.items():
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(TASKS)}"
            raise RecipeError(f"training mix: unknown task '{task}'; {hint}")
        if not (math.isfinite(ratio) and ratio >= 0):
            raise RecipeError(f"training mix: {task}: ratio {ratio}; write a number from 0 up")
    if not any(ratios.values()):
        raise RecipeError("training mix: every ratio is 0; give at least one task a positive ratio")
    whole = sum(ratios.values())
    quotas = {task: total * ratios[task] / whole for task in TASKS if task in ratios}
    shares = {task: math.floor(quota) for task, quota in quotas.items()}
    by_remainder = sorted(shares, key=lambda task: shares[task] - quotas[task])
    for task in by_remainder[: total - sum(shares.values())]:
        shares[task] += 1
    return shares


def _distinct(
    task: str,
    count: int,
    rng: np.random.Generator,
    *,
    excluded: frozenset[str],
    vocabulary: Vocabulary,
) -> list[Record]:
    """Up to `count` distinct records in random order, without the excluded texts."""
    records: list[Record] = []
    for place in rng.permutation(math.prod(space(task, vocabulary))):
        if len(records) == count:
            break
        record = record_at(task, int(place), vocabulary)
        if record["prompt"] not in excluded:
            records.append(record)
    return records
