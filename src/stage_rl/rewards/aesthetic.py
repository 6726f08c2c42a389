"""LAION's improved aesthetic predictor, version 2: how well people would rate an image, 1 to 10.

The head was trained on CLIP ViT-L/14 vectors of length 1; it gives other numbers for longer ones.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stage_rl.errors import WeightsError
from stage_rl.rewards.affine_head import AffineHead
from stage_rl.rewards.base import Score
from stage_rl.rewards.clip import Clip
from stage_rl.rewards.conversion import fill_part, read_tensors
from stage_rl.rewards.tiny import TINY, random_model
from stage_rl.types import Prompt


@dataclass(frozen=True)
class AestheticReward:
    """The predicted rating; the prompt plays no part."""

    clip: Clip
    head: AffineHead

    @torch.inference_mode()
    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image."""
        ratings = self.head(self.clip.images_ND(images_NHWC)).tolist()
        return [Score(rating, f"rated {rating:.2f} of 10") for rating in ratings]


def load_head(path: str, *, width: int, device: torch.device | str = "cpu") -> AffineHead:
    """The head for vectors of a width from a published .pth file; `tiny`: random weights."""
    if path == TINY:
        head = random_model(lambda: AffineHead(width), scale=4.0)
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise WeightsError(
                f"{path}: no such file; write the path of sac+logos+ava1-l14-linearMSE.pth from "
                "github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        head = AffineHead(width)
        fill_part(head, read_tensors(file), source=path)
    nn.Module.to(head, device)
    return head
