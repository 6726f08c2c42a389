"""Images that were made elsewhere, matched with the prompts of a benchmark.

Three layouts are known: the official GenEval folders NNNNN/metadata.jsonl with NNNNN/samples/*; a
file images.jsonl with {"file": ..., "prompt": ...} per line; and T2I-CompBench's file names
PROMPT_NUMBER.png, beside each other or under samples/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from stage_rl.errors import InputError
from stage_rl.evaluation.images import DrawnPrompt
from stage_rl.prompts.leakage import plain_text
from stage_rl.prompts.reading import read_records, text_of
from stage_rl.types import Prompt

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LIST = "images.jsonl"
Found = tuple[Path, str, int | None]
"""A file, the text it was drawn for, and its prompt's number where the layout has one."""


def find_images(folder: Path, prompts: Sequence[Prompt], benchmark: str) -> list[DrawnPrompt]:
    """The prompts of a benchmark that have images, each with its files in order of their names.

    An image of a prompt that the benchmark lacks is an `InputError`. Of prompts with equal texts
    the one with the number of the image's folder is taken, else the first.
    """
    if not folder.is_dir():
        raise InputError(f"--images {folder}: no such folder; name one with images")
    places: dict[str, int] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(plain_text(prompt.text), place)
    files: dict[int, list[Path]] = {}
    for file, text, number in _listed(folder):
        plain = plain_text(text)
        if number is not None and number < len(prompts):
            own = plain_text(prompts[number].text) == plain
            place = number if own else places.get(plain)
        else:
            place = places.get(plain)
        if place is None:
            raise InputError(
                f"{file}: '{text[:60]}' is no prompt of {benchmark}; remove it, or name the "
                "benchmark it was drawn for"
            )
        files.setdefault(place, []).append(file)
    return [DrawnPrompt(n, prompts[n], tuple(sorted(files[n]))) for n in sorted(files)]


def _listed(folder: Path) -> Iterator[Found]:
    """The images of a folder; one that holds none in a known layout is an `InputError`."""
    if (folder / LIST).exists():
        yield from _in_list(folder)
        return
    records = sorted(folder.glob("*/metadata.jsonl"))
    if records:
        for file in records:
            yield from _in_record(file)
        return
    named = [*_by_name(folder), *_by_name(folder / "samples")]
    if not named:
        raise InputError(
            f"--images {folder}: holds no images in a known layout; write NNNNN/metadata.jsonl "
            f"with NNNNN/samples/0000.png, or {LIST}"
        )
    yield from named


def _in_list(folder: Path) -> Iterator[Found]:
    for where, record in read_records(folder / LIST):
        name = text_of(record, where, "file")
        if not (folder / name).is_file():
            raise InputError(f"{where}: file '{name}' is not there; write a path below {folder}")
        yield folder / name, text_of(record, where), None


def _in_record(file: Path) -> Iterator[Found]:
    """The images of one folder of the GenEval layout."""
    where, record = next(read_records(file))
    number = int(file.parent.name) if file.parent.name.isdigit() else None
    pictures = [p for p in (file.parent / "samples").glob("*") if p.suffix.lower() in ENDINGS]
    if not pictures:
        raise InputError(f"{file.parent}: no images under samples/; put them there")
    for picture in pictures:
        yield picture, text_of(record, where), number


def _by_name(folder: Path) -> list[Found]:
    found: list[Found] = []
    for picture in sorted(folder.glob("*")):
        name = re.fullmatch(r"(.+)_\d+", picture.stem)
        if picture.suffix.lower() in ENDINGS and name:
            found.append((picture, name.group(1), None))
    return found
