"""Whether a reward orders images whose order is known, found out before it steers a training.

A model that is loaded wrongly still gives numbers; on a pair such as a red square and a blue one
for "a red square" it gives them the wrong way round, or the same one twice.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stage_rl.errors import RewardError
from stage_rl.rewards.base import Reward, Score
from stage_rl.schema import RewardConfig
from stage_rl.types import Prompt

IMAGE_SIZE = 384
"""Pixels along a side of the images drawn here, the size that Janus draws."""


@dataclass(frozen=True)
class ReferenceCase:
    """Two images of one size, the first of which suits the prompt better beyond doubt."""

    prompt: Prompt
    """With all metadata that the reward requires."""
    better_image: Image.Image
    worse_image: Image.Image
    what: str
    """The two images in words, such as: a red square against a blue one."""

    def images_NHWC(self) -> Tensor:
        """The better and the worse image as a reward gets them: RGB, uint8, on the CPU."""
        pair = (self.better_image, self.worse_image)
        return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in pair]))


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
