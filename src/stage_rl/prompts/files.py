"""Prompts: the base of every prompt set, which prompts a step takes, and how their files are read.

Whatever is wrong in a file is an `InputError` that begins with the place: FILE:LINE, or
FILE: record N in an array.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from stage_rl.errors import InputError, RecipeError
from stage_rl.settings import Component, did_you_mean, validation_error
from stage_rl.types import Prompt, is_text

Record = dict[str, Any]
"""What a file says of one prompt."""


class PromptsConfig(Component):
    """Base of the prompt sets."""

    family: ClassVar[str] = "prompts"

    @abstractmethod
    def build(self) -> tuple[Prompt, ...]:
        """The prompts in their own order; the trainer draws from them by seed."""


class OneSourceConfig(PromptsConfig):
    """Base of the prompt sets that come from exactly one of several sources."""

    sources: ClassVar[tuple[str, ...]]
    """The keys of which a recipe writes one."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in self.sources if getattr(self, key) is not None]
        if len(given) != 1:
            text = f"{' and '.join(given) or 'nothing'} given; write one of "
            key = given[-1] if given else self.sources[0]
            raise validation_error(key, text + ", ".join(self.sources))
        return self


def as_prompts(records: Iterable[Record]) -> tuple[Prompt, ...]:
    """Records as prompts, numbered in their order."""
    return tuple(Prompt(record["prompt"], i, record) for i, record in enumerate(records))


def read_prompts(path: Path, column: str = "prompt") -> Iterator[tuple[str, str, Record]]:
    """The place, text and record of each prompt of a file; none at all is an `InputError`.

    A file is JSON lines or one JSON array (.jsonl, .json), a table with a header (.csv), or else
    plain text with one prompt per line, whose records are empty.
    """
    if path.suffix not in (".csv", ".jsonl", ".json"):
        yield from ((where, line, {}) for where, line in read_lines(path))
        return
    rows = _read_table(path, column) if path.suffix == ".csv" else read_records(path)
    for where, record in rows:
        yield where, text_of(record, where, column), record


def read_lines(path: Path) -> list[tuple[str, str]]:
    """The place and text of each line, stripped; an empty line or file is an `InputError`."""
    lines = _read_text(path).split("\n")
    if not lines[-1]:
        lines.pop()  # what follows the last newline
    if not lines:
        raise InputError(f"{path}: holds no prompts")
    placed = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1)]
    for where, line in placed:
        if not line:
            raise InputError(f"{where}: empty prompt; write a text or remove the line")
    return placed


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and value of each JSON line, or item of one array; None is dropped within them."""
    text = _read_text(path)
    if text.lstrip().startswith("[") and path.suffix == ".json":
        values = _parse(text, str(path))
        if not values:
            raise InputError(f"{path}: holds no prompts")
        yield from ((f"{path}: record {n}", drop_none(one)) for n, one in enumerate(values))
        return
    for where, line in read_lines(path):
        yield where, drop_none(_parse(line, where))


def read_records(path: Path) -> Iterator[tuple[str, Record]]:
    """The place and record of each value of a JSON file; no object is an `InputError`."""
    for where, value in read_json(path):
        if not isinstance(value, dict):
            raise InputError(f'{where}: not a JSON object; write {{"prompt": ...}}')
        yield where, value


def _read_table(path: Path, column: str) -> list[tuple[str, Record]]:
    """The place and cells of each row of a CSV file with this column; empty cells left out."""
    # csv splits the lines itself: a quoted cell may hold a newline.
    rows = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    placed: list[tuple[str, Record]] = []
    try:
        if column not in (rows.fieldnames or ()):
            hint = did_you_mean(column, rows.fieldnames or ())
            raise InputError(f"{path}:1: no column '{column}'; {hint}")
        twice = [name for name, count in Counter(rows.fieldnames).items() if count > 1]
        if twice:
            raise InputError(f"{path}:1: several columns are named '{twice[0]}'; keep one")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                raise InputError(f"{where}: not as many cells as columns; quote a comma in a text")
            placed.append((where, {k: cell.strip() for k, cell in row.items() if cell.strip()}))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not CSV: {error}") from error
    if not placed:
        raise InputError(f"{path}: holds no prompts")
    return placed


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not (
            path.is_file() or path.is_dir()
        ):  # a device or a pipe may have no end
            raise InputError(f"{path}: is not a plain file; name one")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_unique, where))
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.pos >= len(text.rstrip()) - 1:
            hint = "write each object on one line, or one array in a .json file"
            raise InputError(f"{where}: a JSON object that does not end here; {hint}") from error
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise InputError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from error
    except RecursionError as error:
        raise InputError(f"{where}: is nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not JSON: a number of more than 4,300 digits") from error


def _unique(where: str, pairs: list[tuple[str, Any]]) -> Record:
    record: Record = {}
    for key, value in pairs:
        if key in record:
            raise InputError(f"{where}: key '{key}' is written twice; keep one")
        record[key] = value
    return record


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
    if not is_text(text):
        raise InputError(f"{where}: {text[:40]!a} is no Unicode text; write plain words")
    return text.strip()


def whole(value: Any, where: str, *, minimum: int | None = None) -> int:
    """A whole number, also from a string of digits."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{where}: {value!r} is not a whole number")
    if minimum is not None and value < minimum:
        raise InputError(f"{where}: {value}; write {minimum} or more")
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
    raise InputError(f"{where}: unknown {value!r}; {did_you_mean(str(value), allowed)}")


def prompts_of_step(
    prompts: Sequence[Prompt], *, step: int, prompts_per_step: int, seed: int
) -> tuple[Prompt, ...]:
    """The prompts of a step (from 0) in an endless row of epochs, each in an order of its own.

    A pure function, so that a resumed run goes on where it stopped. An epoch has as many full steps
    as fit; the few prompts left over differ from epoch to epoch. So no step holds a prompt twice:
    its images would be drawn from the same random streams.
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


def prompt_order(num_prompts: int, *, epoch: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the prompts' places, keyed by (seed, epoch)."""
    # The counter's last word keeps these numbers apart from the streams that images are drawn with.
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1 << 63])
    return np.random.Generator(bits).permutation(num_prompts)
