"""Whether a reward orders images whose order is known, found out before it steers a training.

A model that is loaded wrongly still gives numbers; on a pair such as a red square and a blue one
for "a red square" it gives them the wrong way round, or the same one twice.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from stage_rl.errors import RewardError, WeightsError
from stage_rl.prompts.geneval import Record, colors_record, single_object_record
from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig, Score
from stage_rl.types import Prompt

IMAGE_SIZE = 384
"""Pixels along a side of the images drawn here, the size that Janus draws."""


@dataclass(frozen=True)
class Outcome:
    """What a reward said of one case."""

    case: ReferenceCase
    better: Score
    worse: Score

    @property
    def is_right(self) -> bool:
        """Whether the better image has the higher score; equal, absent and NaN scores are wrong."""
        better, worse = (_number(score) for score in (self.better, self.worse))
        return better > worse

    def sentence(self) -> str:
        """The scores of both images, and what they are of."""
        better, worse = (_written(score) for score in (self.better, self.worse))
        return f"'{self.case.prompt.text}': {self.case.what}: {better} against {worse}"


def check_reward(config: RewardConfig, reward: Reward) -> tuple[Outcome, ...]:
    """The outcome of every reference case of a config with the reward it built; () without cases.

    What the reward raises comes through.
    """
    outcomes = []
    for case in config.reference_cases():
        scores = reward(case.images_NHWC(), [case.prompt, case.prompt])
        if len(scores) != 2:
            raise RewardError(f"reward '{config.name}': {len(scores)} scores for 2 images")
        outcomes.append(Outcome(case, *scores))
    return tuple(outcomes)


def require_order(config: RewardConfig, reward: Reward) -> None:
    """Raises a RewardError unless the reward orders all reference cases of its config."""
    outcomes = check_reward(config, reward)
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    if wrong:
        raise RewardError(
            f"reward '{config.name}': {len(wrong)} of {len(outcomes)} reference pairs are in the "
            f"wrong order; {wrong[0].sentence()}; put its weights right, or write "
            "self_test: false in the reward to train without this check"
        )


def shape_image(
    shape: str, color: str, *, size: int = IMAGE_SIZE, background: str = "white"
) -> Image.Image:
    """A square, circle or triangle over the middle half of an image; colours as PIL names them."""
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    near, far = size // 4, 3 * size // 4
    if shape == "square":
        draw.rectangle((near, near, far, far), fill=color)
    elif shape == "circle":
        draw.ellipse((near, near, far, far), fill=color)
    else:
        assert shape == "triangle", shape
        draw.polygon(((size // 2, near), (near, far), (far, far)), fill=color)
    return image


def shape_cases(
    pairs: Sequence[tuple[str, str, str, str]] = (
        ("red", "square", "blue", "square"),
        ("blue", "square", "red", "square"),
        ("green", "circle", "green", "triangle"),
    ),
) -> tuple[ReferenceCase, ...]:
    """Drawn shapes: the prompt names colour and shape of the first image, not of the second.

    The same two images in both orders catch a reward that overlooks the prompt.
    """
    return tuple(
        ReferenceCase(
            Prompt(f"a {color} {shape}", index),
            shape_image(shape, color),
            shape_image(other_shape, other_color),
            f"a {color} {shape} against a {other_color} {other_shape}",
        )
        for index, (color, shape, other_color, other_shape) in enumerate(pairs)
    )


def _number(score: Score) -> float:
    return math.nan if score.value is None else float(score.value)


def _written(score: Score) -> str:
    return f"no score ({score.why})" if score.value is None else f"{score.value:.4f}"


# Reference cases for what drawings are no fair test of: two photographs under CC0.


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


# Images as they come out of a JPEG file, which some published figures were measured on.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


Result = TypeVar("Result")


@dataclass(frozen=True)
class OnJpeg(Generic[Result]):
    """A reward or detector that sees its images as JPEG of a quality from 1 to 100."""

    look: Callable[[Tensor, Any], Result]
    quality: int

    def __call__(self, images_NHWC: Tensor, prompts: Any) -> Result:
        """What it says of the compressed images."""
        return self.look(as_jpeg(images_NHWC, self.quality), prompts)


def as_jpeg(images_NHWC: Tensor, quality: int) -> Tensor:
    """The images (uint8) written as JPEG and read again."""
    return torch.stack([torch.from_numpy(_reread(image_HWC, quality)) for image_HWC in images_NHWC])


def _reread(image_HWC: Tensor, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image_HWC.cpu().numpy()).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))


PAIR = ("cat", "cup")
"""What the photographs for self-tests show."""


def _cat_or_cup() -> tuple[ReferenceCase, ...]:
    """Either photograph against the other."""
    from stage_rl.rewards.base import ReferenceCase

    return tuple(
        _asking(
            ReferenceCase(
                Prompt(f"a photo of a {noun}", index),
                photograph(noun),
                photograph(other),
                f"a {noun} against a {other}",
            ),
            noun,
        )
        for index, (noun, other) in enumerate((PAIR, PAIR[::-1]))
    )


def _asking(case: ReferenceCase, noun: str) -> ReferenceCase:
    """The case with the metadata of a T2I-R1 prompt for one object."""
    metadata = {"task_type": "object", "nouns": [noun]}
    return replace(case, prompt=replace(case.prompt, metadata=metadata))
