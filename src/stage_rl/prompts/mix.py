"""Training prompts in a given ratio of the GenEval tasks, apart from the evaluation prompts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping

import numpy as np

from stage_rl.errors import RecipeError
from stage_rl.prompts.geneval import (
    GENEVAL,
    TASKS,
    Record,
    Vocabulary,
    color_attr_record,
    colors_record,
    counting_record,
    geneval_prompts,
    position_record,
    single_object_record,
    two_object_record,
)

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
