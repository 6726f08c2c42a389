"""Rewards that are a cosine of CLIP: HPSv2.1, PickScore and the plain CLIP score.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stage_rl.rewards.base import Score
from stage_rl.rewards.clip import Clip, Preprocess, clip_pixels
from stage_rl.types import Prompt


@dataclass(frozen=True)
class CosineReward:
    """The cosine of image and prompt times a factor."""

    clip: Clip
    preprocess: Preprocess = clip_pixels
    factor: float = 1.0

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image; a prompt is encoded once, however many images it has."""
        cosines_N = self.clip.cosines_N(
            images_NHWC, [prompt.text for prompt in prompts], self.preprocess
        )
        return [
            Score(self.factor * cosine, f"cosine {cosine:.4f} with the prompt")
            for cosine in cosines_N.tolist()
        ]
