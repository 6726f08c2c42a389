"""Reference cases for what drawings are no fair test of: two photographs under CC0."""

from __future__ import annotations

from importlib import resources

import numpy as np
from PIL import Image, ImageOps

from stage_rl.errors import WeightsError
from stage_rl.prompts import Record, colors_record, single_object_record
from stage_rl.rewards.selftest import ReferenceCase
from stage_rl.types import Prompt


def photograph(name: str) -> Image.Image:
    """The photograph of a cat or a cup, 384 x 256."""
    file = resources.files("stage_rl") / "rewards" / "reference" / f"{name}.jpg"
    if not file.is_file():
        raise WeightsError(f"{file}: this copy of the package lacks it; reinstall the package")
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def noise(size: tuple[int, int]) -> Image.Image:
    """Independent random pixels, the same each time; the size is width and height."""
    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def tinted(image: Image.Image, color: str) -> Image.Image:
    """The image in shades of one colour."""
    return ImageOps.colorize(image.convert("L"), black="black", mid=color, white="white")


def photograph_cases() -> tuple[ReferenceCase, ...]:
    """Photographs against noise, for rewards that rate the image alone."""
    return tuple(
        ReferenceCase(
            Prompt(f"a photo of a {name}", index),
            photograph(name),
            noise((384, 256)),
            f"a photograph of a {name} against noise",
        )
        for index, name in enumerate(("cat", "cup"))
    )


def detector_cases() -> tuple[ReferenceCase, ...]:
    """Objects and colours with GenEval metadata, for a detector under the GenEval rules."""
    cat, cup = photograph("cat"), photograph("cup")
    green, red = tinted(cat, "green"), tinted(cat, "red")
    rows: tuple[tuple[Record, Image.Image, Image.Image, str], ...] = (
        (single_object_record("cat"), cat, cup, "a cat against a cup"),
        (single_object_record("cup"), cup, cat, "a cup against a cat"),
        (colors_record("green", "cat"), green, red, "a cat in green against one in red"),
        (colors_record("red", "cat"), red, green, "a cat in red against one in green"),
    )
    return tuple(
        ReferenceCase(Prompt(record["prompt"], index, record), better, worse, what)
        for index, (record, better, worse, what) in enumerate(rows)
    )
