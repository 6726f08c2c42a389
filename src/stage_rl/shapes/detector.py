"""The reward's detector in the shapes world: small, learned, and as easily fooled as real ones.

A convolutional network looks at each cell of a 12 x 12 grid: is the centre of an object here, of
which class and colour, and how far do its sides reach?

Shape suffixes: N images, C channels, H x W pixels, Y x X cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stage_rl.errors import WeightsError
from stage_rl.rewards.base import Detection, DetectorConfig
from stage_rl.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES
from stage_rl.types import Prompt

CELL = 4
"""Pixels along one side of a cell."""

WEIGHTS = Path(__file__).with_name("detector.safetensors")

MIN_SCORE = 0.05
"""Detections below are not worth listing; the reward's thresholds lie far above."""


class DetectorOutput(NamedTuple):
    """Raw outputs for every cell."""

    object_NYX: Tensor
    """Logit: the centre of an object lies here."""
    shape_NCYX: Tensor
    color_NCYX: Tensor
    sides_NCYX: Tensor
    """Distances to the box's left, top, right and bottom side, in units of ten pixels."""


class DetectorNet(nn.Module):
    """About 80 thousand parameters."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, stride=2, padding=1)
        self.down = nn.Conv2d(20, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.out = nn.Conv2d(width, 1 + len(SHAPES) + len(COLORS) + 4, 1)

    def forward(self, pixels_NCHW: Tensor) -> DetectorOutput:
        """Looks at images in [-1, 1]."""
        x = F.relu(self.down(F.relu(self.stem(pixels_NCHW))))
        for block in self.blocks:
            x = x + F.relu(block(x))
        center, *others = self.out(x).split([1, len(SHAPES), len(COLORS), 4], dim=1)
        return DetectorOutput(center[:, 0], *others)


class ShapesDetector:
    """Finds the shapes of images with a trained `DetectorNet`."""

    def __init__(self, net: DetectorNet, device: torch.device) -> None:
        self.net = net.to(device).eval()
        self.device = device

    @classmethod
    def load(cls, device: torch.device, path: Path = WEIGHTS) -> ShapesDetector:
        """Reads the shipped weights, or others of the same form."""
        net = DetectorNet()
        if not path.is_file():
            raise WeightsError(
                f"{path}: no detector weights; make them with 'stage shapes pretrain'"
            )
        net.load_state_dict({name: t.float() for name, t in load_file(path).items()})
        return cls(net, device)

    @torch.inference_mode()
    def __call__(
        self, images_NHWC: Tensor, prompts: Sequence[Prompt] = ()
    ) -> list[list[Detection]]:
        """The detections of each image, most confident first; the prompts play no part."""
        if tuple(images_NHWC.shape[1:]) != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise WeightsError(
                f"shapes detector: images of {tuple(images_NHWC.shape[1:])}; it reads "
                f"{IMAGE_SIZE} x {IMAGE_SIZE} x 3, what the shapes policy draws"
            )
        pixels = images_NHWC.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        out = self.net(pixels)
        center_NYX = out.object_NYX.sigmoid()
        # One object answers in several cells: only the strongest of a neighbourhood counts.
        peak_NYX = center_NYX == F.max_pool2d(center_NYX[:, None], 3, 1, 1)[:, 0]
        shape = out.shape_NCYX.softmax(1).max(1)
        score_NYX = torch.where(peak_NYX, center_NYX * shape.values, 0)
        color_NYX = out.color_NCYX.argmax(1)
        found: list[list[Detection]] = [[] for _ in images_NHWC]
        colors = list(COLORS)
        for n, y, x in (score_NYX > MIN_SCORE).nonzero().tolist():
            left, top, right, bottom = (10 * out.sides_NCYX[n, :, y, x]).tolist()
            cx, cy = (x + 0.5) * CELL, (y + 0.5) * CELL
            found[n].append(
                Detection(
                    label=SHAPES[int(shape.indices[n, y, x])],
                    score=float(score_NYX[n, y, x]),
                    box=(cx - left, cy - top, cx + right, cy + bottom),
                    color=colors[int(color_NYX[n, y, x])],
                )
            )
        return [sorted(detections, key=lambda d: -d.score) for detections in found]


class ShapesDetectorConfig(DetectorConfig):
    """The small learned detector that comes with the package."""

    def build(self, device: torch.device) -> ShapesDetector:
        """The detector; a copy of the package without its weights is a `WeightsError`."""
        return ShapesDetector.load(device)
