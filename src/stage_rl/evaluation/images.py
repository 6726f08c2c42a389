"""The images of a benchmark as files: NNNNN/metadata.jsonl and NNNNN/samples/0000.png.

This is the layout of the official GenEval evaluator. NNNNN is the place of the prompt in its set.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
    measures_file: Path | None = None
    """The measures of all images together, which were taken when they were drawn."""

    def read_measures(self) -> dict[str, float] | None:
        """Those of as many images as there are files; None where they are not there."""
        if self.measures_file is None or not self.measures_file.exists():
            return None
        kept = json.loads(self.measures_file.read_text(encoding="utf-8"))
        return kept["measures"] if kept["num_images"] == len(self.files) else None


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images that are drawn here."""

    root: Path
    with_measures: bool = False
    """Every prompt has measures of its images together."""

    def drawn(self, place: int, prompt: Prompt, num_images: int) -> DrawnPrompt:
        """A prompt with the files of its images, whether they are there or not."""
        folder = self.root / f"{place:05d}"
        files = tuple(folder / "samples" / f"{image:04d}.png" for image in range(num_images))
        measures_file = folder / "measures.json" if self.with_measures else None
        return DrawnPrompt(place, prompt, files, measures_file)

    def is_lacking(self, drawn: DrawnPrompt) -> bool:
        """Whether some of a prompt is not there yet."""
        if self.with_measures and drawn.read_measures() is None:
            return True
        return not all(file.exists() for file in drawn.files)

    def write(
        self, drawn: DrawnPrompt, images_GHWC: Tensor, measures: Mapping[str, float] | None
    ) -> None:
        """Writes what is not there yet; a folder of another prompt is an `InputError`."""
        prompt, record = drawn.prompt, self.root / f"{drawn.place:05d}" / "metadata.jsonl"
        if record.exists():
            text = json.loads(record.read_text(encoding="utf-8")).get("prompt")
            if text != prompt.text:
                raise InputError(
                    f"{record}: holds the images of '{text}', not of '{prompt.text}'; name another "
                    "--out"
                )
        else:
            (record.parent / "samples").mkdir(parents=True, exist_ok=True)
            values = {**prompt.metadata, "prompt": prompt.text}
            replace_text(record, json.dumps(values, ensure_ascii=False) + "\n")
        for file, image_HWC in zip(drawn.files, images_GHWC, strict=True):
            if not file.exists():
                replace_file(file, Image.fromarray(image_HWC.numpy()).save)
        if drawn.measures_file is not None:
            kept = {"num_images": len(drawn.files), "measures": measures}
            replace_text(drawn.measures_file, json.dumps(kept) + "\n")


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


# Images that were made elsewhere, matched with the prompts of a benchmark. Three layouts are known:
# the official GenEval folders NNNNN/metadata.jsonl with NNNNN/samples/*; a file images.jsonl with
# {"file": ..., "prompt": ...} per line; and T2I-CompBench's file names PROMPT_NUMBER.png, beside
# each other or under samples/.

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
    texts = [plain_text(prompt.text) for prompt in prompts]
    files: dict[int, list[Path]] = {}
    for file, text, number in _listed(folder):
        plain = plain_text(text)
        if plain not in texts:
            raise InputError(
                f"{file}: '{text[:60]}' is no prompt of {benchmark}; remove it, or name the "
                "benchmark it was drawn for"
            )
        own = number is not None and number < len(texts) and texts[number] == plain
        place = number if own and number is not None else texts.index(plain)
        files.setdefault(place, []).append(file)
    return [DrawnPrompt(n, prompts[n], tuple(sorted(files[n]))) for n in sorted(files)]


def _listed(folder: Path) -> Iterator[Found]:
    """The images of a folder; one that holds none in a known layout is an `InputError`."""
    if (folder / LIST).exists():
        for where, record in read_records(folder / LIST):
            file = folder / text_of(record, where, "file")
            if not file.is_file():
                name = record["file"]
                raise InputError(
                    f"{where}: file '{name}' is not there; write a path below {folder}"
                )
            yield file, text_of(record, where), None
        return
    found = [one for file in sorted(folder.glob("*/metadata.jsonl")) for one in _in_record(file)]
    found = found or [*_by_name(folder), *_by_name(folder / "samples")]
    if not found:
        raise InputError(
            f"--images {folder}: holds no images in a known layout; write NNNNN/metadata.jsonl "
            f"with NNNNN/samples/0000.png, or {LIST}"
        )
    yield from found


def _in_record(file: Path) -> Iterator[Found]:
    """The images of one folder of the GenEval layout."""
    where, record = next(read_records(file))
    number = int(file.parent.name) if file.parent.name.isdigit() else None
    pictures = [p for p in (file.parent / "samples").glob("*") if p.suffix.lower() in ENDINGS]
    if not pictures:
        raise InputError(f"{file.parent}: no images under samples/; put them there")
    for picture in pictures:
        yield picture, text_of(record, where), number


def _by_name(folder: Path) -> Iterator[Found]:
    for picture in sorted(folder.glob("*")):
        name = re.fullmatch(r"(.+)_\d+", picture.stem)
        if picture.suffix.lower() in ENDINGS and name:
            yield picture, name.group(1), None
