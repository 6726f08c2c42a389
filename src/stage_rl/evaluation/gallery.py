"""The same prompts and random streams drawn by two policies, side by side.

Shape suffixes: N images (prompt by prompt), H x W pixels, C colour channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stage_rl.types import Rollout

SHOWN_PIXELS = 144
GAP = 4
TEXT_HEIGHT = 16
DIVIDER = 16
"""Pixels between the two halves."""


def before_after_grid(before: Rollout, after: Rollout) -> Image.Image:
    """A row per prompt under its text: images of one policy to the left, of the other to the right.

    Both hold as many images of the same prompts; small images are enlarged by a whole factor.
    """
    assert before.prompts == after.prompts
    assert before.group_size == after.group_size
    size = before.group_size
    halves = [_enlarged(drawn.images_NHWC.numpy()) for drawn in (before, after)]
    height, width = (pixels + GAP for pixels in halves[0].shape[1:3])
    half_width, row_height = size * width, TEXT_HEIGHT + height
    canvas = Image.new(
        "RGB",
        (GAP + 2 * half_width + DIVIDER, TEXT_HEIGHT + len(before.prompts) * row_height),
        "white",
    )
    pen = ImageDraw.Draw(canvas)
    lefts = (GAP, GAP + half_width + DIVIDER)
    for left, words in zip(lefts, ("base", "trained"), strict=True):
        pen.text((left, 2), words, fill="black")
    for row, prompt in enumerate(before.prompts):
        top = TEXT_HEIGHT + row * row_height
        pen.text((GAP, top + 2), prompt.text, fill="black")
        for left, images_NHWC in zip(lefts, halves, strict=True):
            for k, image_HWC in enumerate(images_NHWC[row * size : (row + 1) * size]):
                canvas.paste(Image.fromarray(image_HWC), (left + k * width, top + TEXT_HEIGHT))
    return canvas


def _enlarged(images_NHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = max(1, SHOWN_PIXELS // max(images_NHWC.shape[1:3]))
    return images_NHWC.repeat(factor, axis=1).repeat(factor, axis=2)
