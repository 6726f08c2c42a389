"""How near what is seen in an image is, by a monocular depth model.

Shape suffixes: N images, H x W pixels, C colour channels, Y x X of the model's output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoModelForDepthEstimation, DPTConfig, DPTForDepthEstimation

from stage_rl.rewards.pixels import normalize, resize
from stage_rl.rewards.tiny import TINY, random_model
from stage_rl.rewards.weights import load_model

MEAN = STD = (0.5, 0.5, 0.5)
UNREAD = r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."
"""The deepest layer has nothing to add to; published DPTs come without what would add it."""


class DepthModel:
    """Depth on a scale from 0 (far) to 1 (near) in each image."""

    def __init__(self, module: nn.Module, *, side: int, batch_size: int) -> None:
        self._module: Any = module
        self._side = side
        self._batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, images_NHWC: Tensor) -> NDArray[np.float32]:
        """depth_NHW of images (uint8), each from its own least to its own greatest value."""
        size = (images_NHWC.shape[1], images_NHWC.shape[2])
        maps = []
        for images in images_NHWC.split(self._batch_size):
            sized = resize(images, (self._side, self._side), "bicubic")
            pixels = normalize(sized.to(self._module.device), MEAN, STD)
            depth_NYX = self._module(pixel_values=pixels).predicted_depth.float()
            maps.append(interpolate(depth_NYX[:, None], size=size, mode="bicubic")[:, 0].cpu())
        depth_NHW = torch.cat(maps)
        least = depth_NHW.amin((1, 2), keepdim=True)
        spread = depth_NHW.amax((1, 2), keepdim=True) - least
        # An image of one depth has no order; anything but 0 as divisor says so.
        return ((depth_NHW - least) / spread.clamp(min=1e-12)).numpy()


def load_depth(
    path: str, *, side: int, batch_size: int, device: torch.device | str = "cpu"
) -> DepthModel:
    """A model whose output is larger where things are nearer, from a folder or hub id."""
    if path == TINY:
        module = tiny_depth()
        nn.Module.to(module, device)
        return DepthModel(module, side=32, batch_size=batch_size)
    module = load_model(AutoModelForDepthEstimation, path, device=device, unread=UNREAD)
    return DepthModel(module, side=side, batch_size=batch_size)


def tiny_depth() -> DPTForDepthEstimation:
    """A DPT of four layers that reads 32 x 32."""
    config = DPTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    return random_model(lambda: DPTForDepthEstimation(config), scale=4.0)
