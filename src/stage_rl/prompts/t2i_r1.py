"""The T2I-R1 training set: prompts with their nouns, attributes, relations and counts.

github.com/CaraJ7/T2I-R1, data/geneval_and_t2i_data_final.json (JSON lines in spite of its name).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import Record
from stage_rl.prompts.reading import drop_none, known, read_records, text_of, whole, word
from stage_rl.types import Prompt

TASK_TYPES = (
    *("color", "shape", "texture", "spatial", "numeracy"),
    *("object", "non", "complex"),
)
NEEDED = {"spatial": "spatial_info", "numeracy": "numeracy_info"}
"""What a task type cannot be judged without."""


def load_t2i_r1(path: str | Path, task_types: Collection[str] = TASK_TYPES) -> tuple[Prompt, ...]:
    """The prompts of some task types, numbered by their line; a fault is an `InputError`."""
    path = Path(path)
    prompts: list[Prompt] = []
    for number, (where, parsed) in enumerate(read_records(path)):
        record = validate_annotations(parsed, where=where)
        text = text_of(record, where)
        kind = known(record.get("task_type"), TASK_TYPES, f"{where}: task_type")
        for key in ("nouns", NEEDED.get(kind, "nouns")):
            if not record.get(key):
                raise InputError(f"{where}: {key}: a {kind} prompt needs it; write it")
        if kind in task_types:
            prompts.append(Prompt(text, number, record))
    if not prompts:
        raise InputError(f"{path}: no prompt of {', '.join(task_types)}")
    return tuple(prompts)


def validate_annotations(record: Mapping[str, Any], *, where: str) -> Record:
    """The annotations a record has, ready to judge by: None dropped, counts as whole numbers.

    They are nouns, attr_nouns, spatial_info (obj1, obj2, locality) and numeracy_info (a list of
    obj_name, num); other keys are kept. A fault is an `InputError`.
    """
    cleaned = drop_none(record)
    for key in ("nouns", "attr_nouns"):
        if key in cleaned:
            values = cleaned[key]
            if not isinstance(values, list) or not values:
                raise InputError(f"{where}: {key}: {values!r} is not a list of names")
            cleaned[key] = [word(one, f"{where}: {key}.{i}") for i, one in enumerate(values)]
    if "spatial_info" in cleaned:
        keys = ("obj1", "obj2", "locality")
        cleaned["spatial_info"] = _mapping(cleaned["spatial_info"], keys, f"{where}: spatial_info")
        for key in keys:
            word(cleaned["spatial_info"][key], f"{where}: spatial_info.{key}")
    if "numeracy_info" in cleaned:
        cleaned["numeracy_info"] = _counts(cleaned["numeracy_info"], f"{where}: numeracy_info")
    return cleaned


def _counts(items: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items:
        raise InputError(f"{where}: {items!r} is not a list of {{'obj_name': ..., 'num': ...}}")
    counts: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        given = _mapping(item, ("obj_name", "num"), f"{where}.{i}")
        num = whole(given["num"], f"{where}.{i}.num")
        if num < 1:
            raise InputError(f"{where}.{i}.num: {num}; write 1 or more")
        counts.append({**given, "obj_name": word(given["obj_name"], f"{where}.{i}.obj_name")})
        counts[-1]["num"] = num
    return counts


def _mapping(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """A mapping of exactly these keys."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is not a mapping of {', '.join(keys)}")
    for key in value:
        known(key, keys, f"{where}: key")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: {key} is missing; write it")
    return dict(value)
