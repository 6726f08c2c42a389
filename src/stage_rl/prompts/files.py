"""Prompt files: GenEval metadata as JSON lines, or plain text with one prompt per line."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import RELATIONS, TASKS, Record
from stage_rl.prompts.reading import (
    JSON_LINES,
    known,
    read_lines,
    read_records,
    text_of,
    whole,
    word,
)
from stage_rl.types import Prompt

CLAUSE_KEYS = {
    "include": ("class", "count", "color", "position"),
    "exclude": ("class", "count"),
}


def as_prompts(records: Iterable[Record]) -> tuple[Prompt, ...]:
    """Records as prompts, numbered in their order."""
    return tuple(Prompt(record["prompt"], i, record) for i, record in enumerate(records))


def load_prompts(
    path: str | Path,
    *,
    classes: Collection[str] | None = None,
    colors: Collection[str] | None = None,
) -> tuple[Prompt, ...]:
    """The prompts of a file; what is wrong in it is an `InputError` with file and line.

    Where `classes` or `colors` are given, metadata may name no others.
    """
    path = Path(path)
    if path.suffix not in JSON_LINES:
        return tuple(Prompt(line, number) for number, (_, line) in enumerate(read_lines(path)))
    prompts: list[Prompt] = []
    for where, parsed in read_records(path):
        record = validate_metadata(parsed, where=where, classes=classes, colors=colors)
        prompts.append(Prompt(text_of(record, where), len(prompts), record))
    return tuple(prompts)


def validate_metadata(
    record: Mapping[str, Any],
    *,
    where: str,
    classes: Collection[str] | None = None,
    colors: Collection[str] | None = None,
) -> Record:
    """GenEval metadata ready to judge by: None dropped, numbers cast; else an `InputError`.

    Whoever passes metadata through a table gets None for absent keys and numbers as strings; both
    mean what they meant before. Further keys beside tag, include and exclude are kept.
    """
    cleaned = {key: value for key, value in record.items() if value is not None}
    known(cleaned.get("tag"), TASKS, f"{where}: tag")
    if not cleaned.get("include"):
        raise InputError(f"{where}: include: no clause; write [{{'class': 'dog', 'count': 1}}]")
    for key in CLAUSE_KEYS.keys() & cleaned.keys():
        clauses = cleaned[key]
        if not isinstance(clauses, list | tuple):
            raise InputError(f"{where}: {key}: not a list of clauses")
        cleaned[key] = [
            _clause(clause, f"{where}: {key}.{i}", keys=CLAUSE_KEYS[key], place=i)
            for i, clause in enumerate(clauses)
        ]
        for i, clause in enumerate(cleaned[key]):
            if classes is not None:
                known(clause["class"], classes, f"{where}: {key}.{i}.class")
            if colors is not None and "color" in clause:
                known(clause["color"], colors, f"{where}: {key}.{i}.color")
    return cleaned


def _clause(clause: Any, where: str, *, keys: tuple[str, ...], place: int) -> dict[str, Any]:
    if not isinstance(clause, Mapping):
        raise InputError(f"{where}: not a clause; write {{'class': 'dog', 'count': 1}}")
    cleaned = {key: value for key, value in clause.items() if value is not None}
    for key in cleaned:
        known(key, keys, f"{where}: key")
    for key in ("class", "color"):
        if key == "class" or key in cleaned:
            word(cleaned.get(key), f"{where}.{key}")
    cleaned["count"] = whole(cleaned.get("count"), f"{where}.count")
    if cleaned["count"] < 1:
        raise InputError(f"{where}.count: {cleaned['count']}; write 1 or more")
    if "position" in cleaned:
        cleaned["position"] = _position(cleaned["position"], f"{where}.position", place)
    return cleaned


def _position(value: Any, where: str, place: int) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{where}: {value!r}; write [relation, index of an earlier clause]")
    relation, target = value[0], whole(value[1], where)
    known(relation, RELATIONS, where)
    if not 0 <= target < place:
        earlier = f"one of 0 to {place - 1}" if place else "no clause comes before this one"
        raise InputError(f"{where}: index {target} is not an earlier include clause; {earlier}")
    return [relation, target]
