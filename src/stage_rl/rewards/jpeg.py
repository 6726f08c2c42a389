"""Images as they come out of a JPEG file, which some published figures were measured on.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stage_rl.types import Prompt

Result = TypeVar("Result")


def on_jpeg(
    look: Callable[[Tensor, list[Prompt]], Result], quality: int
) -> Callable[[Tensor, list[Prompt]], Result]:
    """A reward or detector that sees its images as JPEG of this quality."""
    return lambda images_NHWC, prompts: look(as_jpeg(images_NHWC, quality), prompts)


def as_jpeg(images_NHWC: Tensor, quality: int) -> Tensor:
    """The images (uint8) written as JPEG and read again."""
    return torch.stack([torch.from_numpy(_reread(image_HWC, quality)) for image_HWC in images_NHWC])


def _reread(image_HWC: Tensor, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image_HWC.cpu().numpy()).save(file, "JPEG", quality=quality)
    return np.array(Image.open(file))
