"""Prompt files: GenEval metadata as JSON lines, or plain text with one prompt per line."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import RELATIONS, TASKS, Record
from stage_rl.types import Prompt

JSON_LINES = (".jsonl", ".json")
"""File endings read as one JSON record per line; any other file is plain text."""
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
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    if not lines:
        raise InputError(f"{path}: holds no prompts")
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise InputError(f"{where}: empty prompt; write a text or remove the line")
        if path.suffix not in JSON_LINES:
            prompts.append(Prompt(line.strip(), number - 1))
            continue
        record = validate_metadata(_parse(line, where), where=where, classes=classes, colors=colors)
        prompts.append(Prompt(_text(record, where), number - 1, record))
    return tuple(prompts)


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line, object_pairs_hook=functools.partial(_unique, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: not a JSON object; write {{'tag': ..., 'include': [...]}}")
    return record


def _unique(where: str, pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{where}: key '{twice}' is written twice; keep one")
    return record


def _text(record: Record, where: str) -> str:
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: empty prompt; write a text under 'prompt'")
    return text.strip()


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
    _known(cleaned.get("tag"), TASKS, f"{where}: tag")
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
                _known(clause["class"], classes, f"{where}: {key}.{i}.class")
            if colors is not None and "color" in clause:
                _known(clause["color"], colors, f"{where}: {key}.{i}.color")
    return cleaned


def _clause(clause: Any, where: str, *, keys: tuple[str, ...], place: int) -> dict[str, Any]:
    if not isinstance(clause, Mapping):
        raise InputError(f"{where}: not a clause; write {{'class': 'dog', 'count': 1}}")
    cleaned = {key: value for key, value in clause.items() if value is not None}
    for key in cleaned:
        _known(key, keys, f"{where}: key")
    for key in ("class", "color"):
        if (key == "class" or key in cleaned) and not _is_word(cleaned.get(key)):
            raise InputError(f"{where}.{key}: {cleaned.get(key)!r} is not a name")
    cleaned["count"] = _whole(cleaned.get("count"), f"{where}.count")
    if cleaned["count"] < 1:
        raise InputError(f"{where}.count: {cleaned['count']}; write 1 or more")
    if "position" in cleaned:
        cleaned["position"] = _position(cleaned["position"], f"{where}.position", place)
    return cleaned


def _position(value: Any, where: str, place: int) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{where}: {value!r}; write [relation, index of an earlier clause]")
    relation, target = value[0], _whole(value[1], where)
    _known(relation, RELATIONS, where)
    if not 0 <= target < place:
        earlier = f"one of 0 to {place - 1}" if place else "no clause comes before this one"
        raise InputError(f"{where}: index {target} is not an earlier include clause; {earlier}")
    return [relation, target]


def _whole(value: Any, where: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {value!r} is not a whole number")
    return value


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _known(value: Any, allowed: Collection[str], where: str) -> None:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(allowed)}"
    raise InputError(f"{where}: unknown {value!r}; {hint}")
