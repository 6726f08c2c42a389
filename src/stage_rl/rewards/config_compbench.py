"""What a recipe says of the T2I-CompBench rewards and of variety; free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stage_rl.rewards.config_scenes import GroundingDinoDetectorConfig
from stage_rl.rewards.config_scorers import CLIP_L14
from stage_rl.schema import Count, DetectorConfig, RewardConfig

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.base import Reward


class AttributesConfig(RewardConfig):
    """T2I-CompBench's attribute score: BLIP asked for each noun phrase of the prompt."""

    required_fields: ClassVar[tuple[str, ...]] = ("attr_nouns",)

    path: str = "Salesforce/blip-vqa-base"
    """Folder or hub id; tiny: random weights, for smoke runs."""
    side: int = Field(default=480, ge=16)
    """Pixels of the square that images are scaled to."""
    batch_size: Count = 16
    """Images at a time, each with all its questions."""

    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""
        from stage_rl.rewards.blip_vqa import AttributeReward, load_blip_vqa

        model = load_blip_vqa(self.path, side=self.side, device=device)
        return AttributeReward(model, self.batch_size)


class ArrangementConfig(RewardConfig):
    """Base of the T2I-CompBench scores that need a detector."""

    detector: DetectorConfig = GroundingDinoDetectorConfig()
    """What finds the nouns of a prompt."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Confidence above which an object counts; the published detector takes 0.5."""


class PlaneConfig(ArrangementConfig):
    """T2I-CompBench's spatial score: two things and where they are in the plane."""

    required_fields: ClassVar[tuple[str, ...]] = ("nouns", "spatial_info")

    confidences: bool = False
    """Weigh an object by the detector's confidence, as published for another detector."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: the released score: "on top of" never holds, depth is read with axes exchanged."""

    def build(self, device: torch.device) -> Reward:
        """The reward with its detector on a device."""
        from stage_rl.rewards.arrangement import PlaneReward

        detector = self.detector.build(device)
        return PlaneReward(
            detector, self.threshold, trusted=not self.confidences, compat=self.compat
        )


class DepthConfig(PlaneConfig):
    """T2I-CompBench's score of relations in depth."""

    depth: str = "Intel/dpt-hybrid-midas"
    """Folder or hub id of the depth model; tiny: random weights, for smoke runs."""
    depth_side: int = Field(default=384, ge=16)
    """Pixels of the square that the depth model reads."""
    batch_size: Count = 8
    """Images at a time in the depth model."""

    def build(self, device: torch.device) -> Reward:
        """The reward with its detector and depth model on a device."""
        from stage_rl.rewards.arrangement import DepthReward
        from stage_rl.rewards.depth import load_depth

        depth = load_depth(
            self.depth, side=self.depth_side, batch_size=self.batch_size, device=device
        )
        detector = self.detector.build(device)
        return DepthReward(
            detector, depth, self.threshold, trusted=not self.confidences, compat=self.compat
        )


class NumeracyConfig(ArrangementConfig):
    """T2I-CompBench's score of numbers of things."""

    required_fields: ClassVar[tuple[str, ...]] = ("nouns", "numeracy_info")

    def build(self, device: torch.device) -> Reward:
        """The reward with its detector on a device."""
        from stage_rl.rewards.arrangement import NumeracyReward

        return NumeracyReward(self.detector.build(device), self.threshold)


class VarietyConfig(RewardConfig):
    """How much the images of a prompt differ, by CLIP's image vectors."""

    whole_groups: ClassVar[bool] = True

    path: str = CLIP_L14
    """Folder or hub id of the CLIP; tiny: random weights, for smoke runs."""
    batch_size: Count = 32
    """Images at a time."""

    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""
        from stage_rl.rewards.clip import load_clip
        from stage_rl.rewards.variety import VarietyReward

        return VarietyReward(load_clip(self.path, device=device, batch_size=self.batch_size))
