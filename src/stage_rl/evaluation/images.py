"""The images of a benchmark as files: NNNNN/metadata.jsonl and NNNNN/samples/0000.png.

This is the layout of the official GenEval evaluator. NNNNN is the place of the prompt in its set.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.training.runs import replace_file, replace_text
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
