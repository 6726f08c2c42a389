"""Reads the images of a request, and refuses what is no image or would not fit.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage_rl.rewards.wire import Drawing
from stage_rl.serving.limits import Limits, Refusal

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">8s4x4sIIBB")
"""Signature, length of the first chunk, its name, width, height, bits, colour type."""
RGB_8_BIT = (8, 2)
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError)
"""What Pillow raises on a PNG that is not whole."""


def png_files(items: Sequence[Drawing], limits: Limits) -> tuple[list[bytes], int]:
    """The PNG files of a request, and the pixels that they decode to.

    Sizes are those of the headers: nothing is decoded before all are known to fit. A Refusal says
    which image is at fault.
    """
    files: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    for place, item in enumerate(items):
        try:
            files.append(base64.b64decode(item.image_png, validate=True))
            sizes.append(_size(files[-1]))
        except (ValueError, binascii.Error) as error:
            raise Refusal(422, "image", f"items.{place}.image_png: {error}") from error
        width, height = sizes[-1]
        if width * height > limits.image_pixels:
            most = f"at most {limits.image_pixels} pixels"
            raise Refusal(413, "pixels", f"items.{place}: {width} x {height}; send {most}")
    if len(set(sizes)) > 1:
        raise Refusal(422, "image", "images of several sizes; send one request for each size")
    pixels = sum(width * height for width, height in sizes)
    if pixels > limits.request_pixels:
        most = f"at most {limits.request_pixels} in a request"
        raise Refusal(413, "pixels", f"{pixels} pixels; send {most}, in fewer images")
    return files, pixels


def decode(files: Sequence[bytes]) -> NDArray[np.uint8]:
    """images_NHWC of PNG files of one size; a Refusal says which is broken."""
    return np.stack([_pixels(file, place) for place, file in enumerate(files)])


def _size(file: bytes) -> tuple[int, int]:
    if len(file) < HEADER.size:
        raise ValueError("is no PNG; send 8-bit RGB as PNG in base64")
    signature, chunk, width, height, *kind = HEADER.unpack_from(file)
    if signature != SIGNATURE or chunk != b"IHDR":
        raise ValueError("is no PNG; send 8-bit RGB as PNG in base64")
    if tuple(kind) != RGB_8_BIT:
        raise ValueError("is not 8-bit RGB; convert it first")
    if not width or not height:
        raise ValueError("has no pixels")
    return width, height


def _pixels(file: bytes, place: int) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
            image.load()
            pixels_HWC = np.asarray(image)
    except BROKEN as error:
        what = f"items.{place}.image_png: is a broken PNG ({error})"
        raise Refusal(422, "image", what) from error
    _, _, width, height, *_ = HEADER.unpack_from(file)
    if pixels_HWC.shape != (height, width, 3):
        raise Refusal(422, "image", f"items.{place}.image_png: is a broken PNG")
    return pixels_HWC
