"""Prompt files without rules of their own: DrawBench, the HPS benchmark, and one's own."""

from __future__ import annotations

from pathlib import Path

from stage_rl.errors import InputError
from stage_rl.prompts.files import validate_metadata
from stage_rl.prompts.geneval import Record
from stage_rl.prompts.reading import (
    JSON_LINES,
    drop_none,
    read_json,
    read_lines,
    read_records,
    read_table,
    text_of,
)
from stage_rl.prompts.t2i_r1 import validate_annotations
from stage_rl.types import Prompt

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The files of the HPSv2 benchmark, each a JSON array of 800 prompts."""


def load_drawbench(path: str | Path) -> tuple[Prompt, ...]:
    """The DrawBench prompts: a CSV file with the columns Prompts and Category."""
    path = Path(path)
    prompts: list[Prompt] = []
    for where, row in read_table(path, ("Prompts", "Category")):
        if "Category" not in row:
            raise InputError(f"{where}: empty Category; write one")
        text = text_of(row, where, "Prompts")
        metadata = {"prompt": text, "category": row["Category"]}
        prompts.append(Prompt(text, len(prompts), metadata))
    return _some(prompts, path)


def load_hps(path: str | Path) -> tuple[Prompt, ...]:
    """The HPS prompts: a folder with anime, concept-art, paintings and photo.json, or one file."""
    path = Path(path)
    files = [path / f"{style}.json" for style in HPS_STYLES] if path.is_dir() else [path]
    prompts: list[Prompt] = []
    for file in files:
        for where, value in read_json(file):
            text = text_of(value if isinstance(value, dict) else {"prompt": value}, where)
            prompts.append(Prompt(text, len(prompts), {"prompt": text, "style": file.stem}))
    return tuple(prompts)


def load_file(path: str | Path, *, column: str = "prompt") -> tuple[Prompt, ...]:
    """One's own prompts: plain text, JSON lines or CSV, with the text under `column`.

    What else a record holds becomes metadata; what the built-in rewards read of it (include, tag,
    exclude, nouns, attr_nouns, spatial_info, numeracy_info) is checked.
    """
    path = Path(path)
    if path.suffix == ".csv":
        records = read_table(path, (column,))
    elif path.suffix in JSON_LINES:
        records = read_records(path)
    else:
        return tuple(Prompt(line, i) for i, (_, line) in enumerate(read_lines(path)))
    prompts = [
        Prompt(text_of(record, where, column), i, checked(record, where))
        for i, (where, record) in enumerate(records)
    ]
    return _some(prompts, path)


def checked(record: Record, where: str) -> Record:
    """A record's known fields ready to judge by, whatever form it has; else an `InputError`."""
    annotated = validate_annotations(drop_none(record), where=where)
    return validate_metadata(annotated, where=where) if "include" in annotated else annotated


def _some(prompts: list[Prompt], path: Path) -> tuple[Prompt, ...]:
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return tuple(prompts)
