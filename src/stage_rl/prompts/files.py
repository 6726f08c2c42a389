"""Prompt files: GenEval metadata as JSON lines, or plain text with one prompt per line."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from stage_rl.errors import InputError, RecipeError
from stage_rl.prompts.geneval import RELATIONS, TASKS, Record
from stage_rl.settings import (
    Component,
    near_or_all,
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


# Prompt files as lines, JSON records or table rows, each with the place that errors name.


JSON_LINES = (".jsonl", ".json")
"""File endings read as JSON: one record per line, or one array of records."""

Placed = tuple[str, Any]
"""FILE:LINE, or FILE: record N in an array, and what stands there."""


def read_text(path: Path) -> str:
    """The text of a file; one that is absent or no UTF-8 text is an `InputError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The lines of a file, stripped; an empty line or file is an `InputError`."""
    lines = read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    if not lines:
        raise InputError(f"{path}: holds no prompts")
    placed = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1)]
    for where, line in placed:
        if not line:
            raise InputError(f"{where}: empty prompt; write a text or remove the line")
    return placed


def read_json(path: Path) -> Iterator[Placed]:
    """The values of a file of JSON lines, or of one JSON array; None is dropped within them."""
    text = read_text(path)
    if text.lstrip().startswith("[") and path.suffix == ".json":
        values = _parse(text, str(path))
        if not values:
            raise InputError(f"{path}: holds no prompts")
        yield from ((f"{path}: record {n}", drop_none(one)) for n, one in enumerate(values))
        return
    for where, line in read_lines(path):
        yield where, drop_none(_parse(line, where))


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The records of a JSON file; whatever is no record is an `InputError`."""
    for where, value in read_json(path):
        if not isinstance(value, dict):
            raise InputError(f'{where}: not a JSON object; write {{"prompt": ...}}')
        yield where, value


def read_table(path: Path, columns: Collection[str]) -> Iterator[tuple[str, Record]]:
    """The rows of a CSV file that has at least these columns; empty cells are left out."""
    # csv splits the lines itself: a quoted cell may hold a newline.
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for column in columns:
            if column not in (rows.fieldnames or ()):
                hint = near_or_all(column, rows.fieldnames or ())
                raise InputError(f"{path}:1: no column '{column}'; {hint}")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: not as many cells as columns; quote a comma in a text")
            yield where, {key: cell.strip() for key, cell in row.items() if cell.strip()}
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not CSV: {error}") from error


def drop_none(value: Any) -> Any:
    """A JSON value without the keys that hold None, as tables write absent ones."""
    if isinstance(value, Mapping):
        return {key: drop_none(one) for key, one in value.items() if one is not None}
    return [drop_none(one) for one in value] if isinstance(value, list | tuple) else value


def text_of(record: Mapping[str, Any], where: str, key: str = "prompt") -> str:
    """The prompt of a record, stripped; an `InputError` where there is none."""
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: empty prompt; write a text under '{key}'")
    return text.strip()


def whole(value: Any, where: str) -> int:
    """A whole number, also from a string of digits."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {value!r} is not a whole number")
    return value


def word(value: Any, where: str) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {value!r} is not a name")
    return value.strip()


def known(value: Any, allowed: Collection[str], where: str) -> str:
    """One of the allowed words."""
    if isinstance(value, str) and value in allowed:
        return value
    raise InputError(f"{where}: unknown {value!r}; {near_or_all(str(value), allowed)}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_unique, where))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise InputError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from error


def _unique(where: str, pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{where}: key '{twice}' is written twice; keep one")
    return record


# Which prompts a step takes: a pure function, so that a resumed run goes on where it stopped.


def prompt_order(num_prompts: int, *, epoch: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the prompts' places, keyed by (seed, epoch)."""
    # The counter's last word keeps these numbers apart from the streams that images are drawn with.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1 << 63])
    return np.random.Generator(bits).permutation(num_prompts)


def prompts_of_step(
    prompts: Sequence[Prompt], *, step: int, prompts_per_step: int, seed: int
) -> tuple[Prompt, ...]:
    """The prompts of a step (from 0) in an endless row of epochs, each in an order of its own.

    An epoch has as many full steps as fit; the few prompts left over differ from epoch to epoch.
    So no step holds a prompt twice: its images would be drawn from the same random streams.
    """
    if prompts_per_step > len(prompts):
        raise RecipeError(
            f"a step takes {prompts_per_step} prompts but the set has {len(prompts)}; "
            f"write at most {len(prompts)}"
        )
    epoch, place = divmod(step, len(prompts) // prompts_per_step)
    order = prompt_order(len(prompts), epoch=epoch, seed=seed)
    first = place * prompts_per_step
    return tuple(prompts[i] for i in order[first : first + prompts_per_step])


class PromptsConfig(Component):
    """Base of the prompt sets."""

    family: ClassVar[str] = "prompts"

    @abstractmethod
    def build(self) -> tuple[Prompt, ...]:
        """The prompts in their own order; the trainer draws from them by seed."""
