"""Images of written text, legible and not, whose OCR scores are known."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from stage_rl.rewards.selftest import IMAGE_SIZE, ReferenceCase
from stage_rl.types import Prompt

WORDS = ("STAGE", "Open Today")


def text_image(text: str, *, size: int = IMAGE_SIZE, color: str = "black") -> Image.Image:
    """A text in one line across the middle of a white image, as large as fits up to an eighth."""
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=size / 8)
    width = draw.textlength(text, font=font)
    if width > 0.9 * size:
        font = ImageFont.load_default(size=size / 8 * 0.9 * size / width)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    place = ((size - right - left) / 2, (size - bottom - top) / 2)
    draw.text(place, text, font=font, fill=color)
    return image


def garbled(image: Image.Image, num_strips: int = 48) -> Image.Image:
    """An image whose upright strips are in another order, always the same: strokes, no letters."""
    width, height = image.size
    strip = width // num_strips
    order = [(i * 19) % num_strips for i in range(num_strips)]  # 19 has no divisor in common
    mixed = Image.new("RGB", image.size, "white")
    for place, source in enumerate(order):
        part = image.crop((source * strip, 0, (source + 1) * strip, height))
        mixed.paste(part, (place * strip, 0))
    return mixed


def written_cases() -> tuple[ReferenceCase, ...]:
    """Words that can be read against their strokes in disorder."""
    return tuple(
        ReferenceCase(
            Prompt(f'a sign that says "{word}"', index),
            text_image(word),
            garbled(text_image(word)),
            f"'{word}' against its strokes in disorder",
        )
        for index, word in enumerate(WORDS)
    )
