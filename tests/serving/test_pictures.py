"""The images of a request: what is decoded, and what is refused before it is."""

import base64
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stage_rl.rewards.protocol import Drawing
from stage_rl.serving.limits import Limits, Refusal
from stage_rl.serving.service import decode, png_files

LIMITS = Limits(image_pixels=100, request_pixels=150)
PIXELS_HWC = np.random.default_rng(0).integers(0, 256, (10, 10, 3), np.uint8)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def made(width, height, *, bits=8, color=2, data=b"\0"):
    """A PNG that claims a size, whatever it holds."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def sent(*files):
    return [Drawing(prompt="a", image_png=base64.b64encode(file).decode()) for file in files]


GOOD = png(Image.fromarray(PIXELS_HWC))


@pytest.mark.parametrize("options", [{}, {"compress_level": 0}, {"compress_level": 9}])
def test_pixels_arrive_as_they_are(options):
    files, pixels = png_files(sent(png(Image.fromarray(PIXELS_HWC), **options)), LIMITS)
    assert pixels == 100
    assert (decode(files) == PIXELS_HWC).all()


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        (b"", "is no PNG"),
        (b"GIF89a" + bytes(40), "is no PNG"),
        (png(Image.new("L", (4, 4))), "is not 8-bit RGB"),
        (png(Image.new("RGBA", (4, 4))), "is not 8-bit RGB"),
        (png(Image.new("P", (4, 4))), "is not 8-bit RGB"),
        (made(4, 4, bits=16), "is not 8-bit RGB"),
        (made(0, 4), "has no pixels"),
    ],
)
def test_what_is_no_rgb_png_is_refused_by_its_header(file, complaint):
    with pytest.raises(Refusal, match=rf"items\.1\.image_png: {complaint}") as caught:
        png_files(sent(GOOD, file), LIMITS)
    assert caught.value.status == 422


def test_what_is_no_base64_is_refused():
    items = [Drawing(prompt="a", image_png="not base64!")]
    with pytest.raises(Refusal, match=r"items\.0\.image_png: "):
        png_files(items, LIMITS)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    bomb = made(30_000, 30_000, data=bytes(10**7))
    assert len(bomb) < 20_000
    with pytest.raises(Refusal, match="30000 x 30000; send at most 100 pixels") as caught:
        png_files(sent(bomb), LIMITS)
    assert caught.value.status == 413


def test_many_images_count_together():
    with pytest.raises(Refusal, match="200 pixels; send at most 150 in a request"):
        png_files(sent(GOOD, GOOD), LIMITS)


def test_images_of_several_sizes_are_refused():
    with pytest.raises(Refusal, match="images of several sizes"):
        png_files(sent(GOOD, png(Image.new("RGB", (5, 5)))), LIMITS)


@pytest.mark.parametrize("file", [made(4, 4), GOOD[:-30], GOOD[:40]])
def test_a_broken_png_is_refused_when_it_is_decoded(file):
    files, _ = png_files(sent(file), LIMITS)
    with pytest.raises(Refusal, match="is a broken PNG"):
        decode(files)


def test_data_beyond_the_claimed_size_is_not_decoded():
    # 4 rows of a filter byte and 4 x 3 bytes are 52; the rest of the 10 MB is left packed.
    files, _ = png_files(sent(made(4, 4, data=bytes(10**7))), LIMITS)
    assert decode(files).shape == (1, 4, 4, 3)


def test_damage_anywhere_is_refused_or_harmless():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(500):
        damaged = bytearray(GOOD)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            decode(png_files(sent(bytes(damaged)), LIMITS)[0])
            outcomes.add("decoded")
        except Refusal as refusal:
            outcomes.add(refusal.code)
    assert {"image", "pixels"} <= outcomes <= {"image", "pixels", "decoded"}
