"""Prompt files as lines, JSON records or table rows, each with the place that errors name."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import Record
from stage_rl.settings import near_or_all

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
