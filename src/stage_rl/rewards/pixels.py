"""From images as rewards get them to the pixel tensors that models were trained on.

The models' own image processors differ between versions and backends, so nothing here asks them;
the tests compare with them.

Shape suffixes: N images, C colour channels, H x W pixels, X x Y pixels after resizing.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Filter = Literal["bilinear", "bicubic"]


def shortest_side_size(
    height: int, width: int, *, shortest: int, longest: int | None = None
) -> tuple[int, int]:
    """Height and width after scaling so that the shorter side is `shortest`, rounded down.

    Where the longer side would exceed `longest`, the image is scaled to that instead.
    """
    small, large = min(height, width), max(height, width)
    target: float = shortest
    if longest is not None and large / small * shortest > longest:
        target = longest * small / large
    along = int(target * large / small)
    return (round(target), along) if height <= width else (along, round(target))


def resize(images_NHWC: Tensor, size: tuple[int, int], filter_: Filter) -> Tensor:
    """images_NCXY of uint8 images, uint8 and on the CPU, filtered as Pillow does it.

    On the CPU, whose 8-bit kernel rounds and clips between the two directions as Pillow does: the
    pixels, and so the scores, are the same wherever the model runs.
    """
    assert images_NHWC.dtype == torch.uint8, images_NHWC.dtype
    images_NCHW = images_NHWC.cpu().movedim(-1, 1)
    if tuple(images_NCHW.shape[-2:]) == size:
        return images_NCHW
    return F.interpolate(images_NCHW, size=size, mode=filter_, align_corners=False, antialias=True)


def center_crop(images_NCHW: Tensor, side: int) -> Tensor:
    """The middle side x side pixels, of images at least that large."""
    height, width = images_NCHW.shape[-2:]
    assert min(height, width) >= side, (height, width, side)
    top, left = (height - side) // 2, (width - side) // 2
    return images_NCHW[..., top : top + side, left : left + side]


def normalize(
    images_NCHW: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Tensor:
    """(x / 255 - mean) / std per channel."""
    shape = (1, 3, 1, 1)
    mean_C = torch.tensor(mean, device=images_NCHW.device).view(shape)
    std_C = torch.tensor(std, device=images_NCHW.device).view(shape)
    return (images_NCHW / 255 - mean_C) / std_C


def clip_pixels(images_NHWC: Tensor, side: int, *, device: torch.device | str) -> Tensor:
    """pixels_NCXX for CLIP-like models: shortest side by bicubic, middle square, CLIP's scale."""
    height, width = images_NHWC.shape[1:3]
    size = shortest_side_size(height, width, shortest=side)
    cropped = center_crop(resize(images_NHWC, size, "bicubic"), side)
    return normalize(cropped.to(device), CLIP_MEAN, CLIP_STD)


def detr_pixels(
    images_NHWC: Tensor, *, shortest: int, longest: int, device: torch.device | str
) -> Tensor:
    """pixels_NCXY for DETR-like models: scaled to fit, bilinear, ImageNet's scale, not padded."""
    height, width = images_NHWC.shape[1:3]
    size = shortest_side_size(height, width, shortest=shortest, longest=longest)
    resized = resize(images_NHWC, size, "bilinear")
    return normalize(resized.to(device), IMAGENET_MEAN, IMAGENET_STD)
