"""Whether a reward orders images whose order is known, found out before it steers a training.

A model that is loaded wrongly still gives numbers; on a pair such as a red square and a blue one
for "a red square" it gives them the wrong way round, or the same one twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw

from stage_rl.errors import RewardError
from stage_rl.rewards.base import ReferenceCase, Reward, RewardConfig, Score
from stage_rl.types import Prompt

IMAGE_SIZE = 384
"""Pixels along a side of the images drawn here, the size that Janus draws."""

SHAPES = (
    ("red", "square", "blue", "square"),
    ("blue", "square", "red", "square"),
    ("green", "circle", "green", "triangle"),
)
"""Colour and shape of the better image, then of the worse. The first two are the same images in
both orders, which catches a reward that overlooks the prompt."""

PHOTOGRAPHS = ("cat", "cup")
"""What the two photographs (CC0, 384 x 256) show: for what drawings are no fair test of."""


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


@dataclass(frozen=True)
class Outcome:
    """What a reward said of one case."""

    case: ReferenceCase
    better: Score
    worse: Score

    @property
    def is_right(self) -> bool:
        """Whether the better image has the higher score; equal, absent and NaN scores are wrong."""
        better, worse = self.better.value, self.worse.value
        return better is not None and worse is not None and better > worse

    def sentence(self) -> str:
        """The scores of both images, and what they are of."""
        better, worse = (
            f"no score ({score.why})" if score.value is None else f"{score.value:.4f}"
            for score in (self.better, self.worse)
        )
        return f"'{self.case.prompt.text}': {self.case.what}: {better} against {worse}"


def shape_cases(
    shapes: tuple[tuple[str, str, str, str], ...] = SHAPES,
) -> tuple[ReferenceCase, ...]:
    """Drawn shapes: the prompt names colour and shape of the first image, not of the second."""
    return tuple(
        ReferenceCase(
            Prompt(f"a {color} {shape}", index),
            shape_image(shape, color),
            shape_image(other_shape, other_color),
            f"a {color} {shape} against a {other_color} {other_shape}",
        )
        for index, (color, shape, other_color, other_shape) in enumerate(shapes)
    )


def shape_image(shape: str, color: str, *, size: int = IMAGE_SIZE) -> Image.Image:
    """A square, circle or triangle over the middle half of a white image; colours as PIL's."""
    image = Image.new("RGB", (size, size), "white")
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


def cat_or_cup_cases() -> tuple[ReferenceCase, ...]:
    """Either photograph against the other."""
    return tuple(
        _photograph_case(index, name, photograph(other), f"a {name} against a {other}")
        for index, (name, other) in enumerate((PHOTOGRAPHS, PHOTOGRAPHS[::-1]))
    )


def noise_cases() -> tuple[ReferenceCase, ...]:
    """Photographs against noise, for rewards that rate the image alone or miss what is absent."""
    pixels = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    return tuple(
        _photograph_case(
            index, name, Image.fromarray(pixels), f"a photograph of a {name} against noise"
        )
        for index, name in enumerate(PHOTOGRAPHS)
    )


def photograph(name: str) -> Image.Image:
    """The photograph of a cat or a cup."""
    file = resources.files("stage_rl") / "rewards" / "reference" / f"{name}.jpg"
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def _photograph_case(index: int, name: str, worse: Image.Image, what: str) -> ReferenceCase:
    """A photograph against another image, with the metadata of a T2I-R1 prompt for one object."""
    prompt = Prompt(f"a photo of a {name}", index, {"task_type": "object", "nouns": [name]})
    return ReferenceCase(prompt, photograph(name), worse, what)
