"""Images as they come out of a JPEG file, which some published figures were measured on.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

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
