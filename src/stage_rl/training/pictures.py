"""Image grids with each image's reward and reason under it.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TILE = 192
"""Least side of a shown image; small ones are enlarged by a whole factor."""
LINE = 13
MAX_LINES = 4


def captioned_grid(
    images_NHWC: Tensor, captions: Sequence[str], *, columns: int, titles: Sequence[str]
) -> Image.Image:
    """The images row by row, each row under its title and each image over its caption."""
    height, width = images_NHWC.shape[1:3]
    factor = max(1, -(-TILE // max(height, width)))
    tile_y, tile_x = factor * height, factor * width
    row_height = LINE + 4 + tile_y + MAX_LINES * LINE + 6
    canvas = Image.new("RGB", (columns * (tile_x + 4) + 4, len(titles) * row_height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for row, title in enumerate(titles):
        draw.text((4, row * row_height + 2), title, "black", font)
    for number, (image_HWC, caption) in enumerate(zip(images_NHWC, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = 4 + column * (tile_x + 4), row * row_height + LINE + 4
        pixels = np.kron(image_HWC.numpy(), np.ones((factor, factor, 1), np.uint8))
        canvas.paste(Image.fromarray(pixels), (left, top))
        lines = textwrap.wrap(caption, tile_x // 6, max_lines=MAX_LINES, placeholder=" ...")
        for place, line in enumerate(lines):
            draw.text((left, top + tile_y + 2 + place * LINE), line, "black", font)
    return canvas
