"""The images of a benchmark as files: NNNNN/metadata.jsonl and NNNNN/samples/0000.png.

This is the layout of the official GenEval evaluator. NNNNN is the place of the prompt in its set.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.files import replace_file, replace_text
from stage_rl.prompts.files import read_records, text_of
from stage_rl.prompts.leakage import plain_text
from stage_rl.types import Prompt


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt with the files of its images, in the order of their random streams."""

    place: int
    """In its set."""
    prompt: Prompt
    files: tuple[Path, ...]


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images that are drawn here."""

    root: Path

    def file(self, place: int, image: int) -> Path:
        """Where an image of a prompt is."""
        return self._folder(place) / "samples" / f"{image:04d}.png"

    def missing(self, place: int, num_images: int) -> list[int]:
        """Which of a prompt's images are not there yet."""
        return [k for k in range(num_images) if not self.file(place, k).exists()]

    def drawn(self, place: int, prompt: Prompt, num_images: int) -> DrawnPrompt:
        """A prompt with its images, all of which are there."""
        return DrawnPrompt(place, prompt, tuple(self.file(place, k) for k in range(num_images)))

    def begin(self, place: int, prompt: Prompt) -> None:
        """Makes the prompt's folder; one that is there for another prompt is an `InputError`."""
        file = self._folder(place) / "metadata.jsonl"
        if file.exists():
            text = json.loads(file.read_text(encoding="utf-8")).get("prompt")
            if text != prompt.text:
                raise InputError(
                    f"{file}: holds the images of '{text}', not of '{prompt.text}'; name another "
                    "--out"
                )
            return
        record = {**prompt.metadata, "prompt": prompt.text}
        (file.parent / "samples").mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(record, ensure_ascii=False) + "\n")

    def write(self, place: int, image: int, image_HWC: Tensor) -> None:
        """Writes one image as PNG."""
        picture = Image.fromarray(image_HWC.numpy())
        replace_file(self.file(place, image), picture.save)

    def _folder(self, place: int) -> Path:
        return self.root / f"{place:05d}"


def read_images(files: Sequence[Path]) -> list[Tensor]:
    """The images (uint8, HWC, RGB) of files; one that cannot be read is an `InputError`."""
    return [_read(file) for file in files]


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")))
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; run the same command again") from error
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(f"{file}: is no image that can be read; remove or replace it") from error


def numbered(prompts: Sequence[Prompt], first: int) -> tuple[Prompt, ...]:
    """Prompts with the indices from `first` on, which key their random streams."""
    return tuple(replace(prompt, index=first + place) for place, prompt in enumerate(prompts))


# Images that were made elsewhere, matched with the prompts of a benchmark.
#
# Three layouts are known: the official GenEval folders NNNNN/metadata.jsonl with NNNNN/samples/*;
# a
# file images.jsonl with {"file": ..., "prompt": ...} per line; and T2I-CompBench's file names
# PROMPT_NUMBER.png, beside each other or under samples/.


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
