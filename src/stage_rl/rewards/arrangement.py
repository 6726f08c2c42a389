"""Rewards of T2I-CompBench that ask where things are and how many.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stage_rl.rewards.base import Detector, Score
from stage_rl.rewards.compbench import depth_score, numeracy_score, plane_score
from stage_rl.rewards.depth import DepthModel
from stage_rl.rewards.t2i_r1 import Compat
from stage_rl.types import Prompt


@dataclass(frozen=True)
class PlaneReward:
    """Whether two things are there and stand as the prompt's `spatial_info` says."""

    detector: Detector
    threshold: float
    trusted: bool
    """What is above the threshold counts in full."""
    compat: Compat = "fixed"

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image."""
        height, width = images_NHWC.shape[1:3]
        return [
            plane_score(
                found,
                prompt.metadata["spatial_info"],
                size=(width, height),
                threshold=self.threshold,
                trusted=self.trusted,
                compat=self.compat,
            )
            for found, prompt in zip(self.detector(images_NHWC, prompts), prompts, strict=True)
        ]


@dataclass(frozen=True)
class DepthReward:
    """The same for relations in depth."""

    detector: Detector
    depth: DepthModel
    threshold: float
    trusted: bool
    compat: Compat = "fixed"

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image."""
        detections = self.detector(images_NHWC, prompts)
        return [
            depth_score(
                found,
                prompt.metadata["spatial_info"],
                depth_HW=depth_HW,
                threshold=self.threshold,
                trusted=self.trusted,
                compat=self.compat,
            )
            for found, prompt, depth_HW in zip(
                detections, prompts, self.depth(images_NHWC), strict=True
            )
        ]


@dataclass(frozen=True)
class NumeracyReward:
    """Whether the things of `numeracy_info` are there in their numbers."""

    detector: Detector
    threshold: float

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image."""
        detections = self.detector(images_NHWC, prompts)
        return [
            numeracy_score(found, prompt.metadata["numeracy_info"], threshold=self.threshold)
            for found, prompt in zip(detections, prompts, strict=True)
        ]
