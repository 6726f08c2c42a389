"""The images of a benchmark as files: NNNNN/metadata.jsonl and NNNNN/samples/0000.png.

This is the layout of the official GenEval evaluator. NNNNN is the place of the prompt in its set.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stage_rl.errors import InputError, RewardError
from stage_rl.files import read_record, replace_file, replace_text
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
    """The measures of all images together, which are taken when they are drawn."""

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        if self.measures_file is not None and self.read_measures() is None:
            return False
        return all(file.exists() for file in self.files)

    def read_measures(self) -> dict[str, float] | None:
        """Those of as many images as there are files; None where they are not there, or cut off."""
        kept = (self.measures_file and read_record(self.measures_file)) or {}
        measures = kept.get("measures") if kept.get("num_images") == len(self.files) else None
        return measures if isinstance(measures, dict) else None

    def read_images(self) -> Tensor:
        """The images (uint8, GHWC, RGB); a `RewardError` where they are of several sizes."""
        images = [_read(file) for file in self.files]
        if len({image.shape for image in images}) != 1:
            raise RewardError(f"{self.files[0].parent}: images of several sizes; make them one")
        return torch.stack(images)

    def write(self, images_GHWC: Tensor, measures: Mapping[str, float] | None) -> None:
        """Writes what is not there yet; a folder of another prompt is an `InputError`."""
        folder = self.files[0].parent
        record = folder.parent / "metadata.jsonl"
        if record.exists():
            kept = read_record(record)
            if kept is None:
                raise InputError(f"{record}: is cut off or damaged; remove {folder.parent}")
            text = kept.get("prompt")
            if text != self.prompt.text:
                raise InputError(
                    f"{record}: holds the images of '{text}', not of '{self.prompt.text}'; name "
                    "another --out"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            values = {**self.prompt.metadata, "prompt": self.prompt.text}
            replace_text(record, json.dumps(values, ensure_ascii=False) + "\n")
        for file, image_HWC in zip(self.files, images_GHWC, strict=True):
            if not file.exists():
                replace_file(file, Image.fromarray(image_HWC.numpy()).save)
        if self.measures_file is not None:
            kept = {"num_images": len(self.files), "measures": measures}
            replace_text(self.measures_file, json.dumps(kept) + "\n")


def planned(
    root: Path, place: int, prompt: Prompt, *, num_images: int, has_measures: bool
) -> DrawnPrompt:
    """A prompt with the files that its images get, whether they are there or not."""
    folder = root / f"{place:05d}"
    files = tuple(folder / "samples" / f"{image:04d}.png" for image in range(num_images))
    return DrawnPrompt(place, prompt, files, folder / "measures.json" if has_measures else None)


def _read(file: Path) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                if picture.mode.startswith("I"):  # 16 bits, which convert() would clip to white
                    gray_HW = (np.array(picture) >> 8).astype(np.uint8)
                    return torch.from_numpy(np.stack([gray_HW] * 3, axis=-1))
                return torch.from_numpy(np.array(picture.convert("RGB")))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{file}: has too many pixels; make it smaller") from error
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file; run the same command again") from error
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{file}: is not an image that can be read; remove or replace it"
        ) from error


# External images, matched with the prompts of a benchmark. Three layouts are known:
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
                f"{file}: '{text[:60]}' is not a prompt of {benchmark}; remove it, or name the "
                "benchmark it was drawn for"
            )
        if number is None or number >= len(texts) or texts[number] != plain:
            number = texts.index(plain)
        files.setdefault(number, []).append(file)
    return [DrawnPrompt(n, prompts[n], tuple(sorted(files[n]))) for n in sorted(files)]


def _listed(folder: Path) -> Iterator[Found]:
    """The images of a folder; one that holds none in a known layout is an `InputError`."""
    if (folder / LIST).exists():
        listed: dict[Path, str] = {}
        for where, record in read_records(folder / LIST):
            name = text_of(record, where, "file")
            if not (folder / name).is_file():
                raise InputError(
                    f"{where}: file '{name}' is not there; write a path below {folder}"
                )
            first = listed.setdefault((folder / name).resolve(), where)
            if first != where:
                raise InputError(
                    f"{where}: file '{name}' is listed already, in {first}; write each file once"
                )
            yield folder / name, text_of(record, where), None
        return
    found = [one for file in sorted(folder.glob("*/metadata.jsonl")) for one in _in_record(file)]
    found = found or [
        (picture, name.group(1), None)
        for picture in (*_pictures(folder), *_pictures(folder / "samples"))
        if (name := re.fullmatch(r"(.+)_\d+", picture.stem))
    ]
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
    pictures = _pictures(file.parent / "samples")
    if not pictures:
        raise InputError(f"{file.parent}: no images under samples/; put them there")
    for picture in pictures:
        yield picture, text_of(record, where), number


def _pictures(folder: Path) -> list[Path]:
    return [file for file in folder.glob("*") if file.suffix.lower() in ENDINGS]
