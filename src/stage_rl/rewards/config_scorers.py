"""What a recipe says of the rewards that are one published model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stage_rl.schema import RewardConfig

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.base import Reward
    from stage_rl.rewards.clip import Clip
    from stage_rl.rewards.selftest import ReferenceCase

TINY = "tiny"
"""The path of random weights, for smoke runs; their scores mean nothing."""
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The CLIP that HPSv2.1 and PickScore were tuned from."""
CLIP_L14 = "openai/clip-vit-large-patch14"


class ScorerConfig(RewardConfig):
    """Base of the rewards that are one model."""

    path: str
    """Folder or hub id of the weights; tiny: random ones, whose scores mean nothing."""
    batch_size: int = Field(default=32, ge=1)
    """Images that go through the model at once."""
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)
    """Score the images as JPEG of this quality, as some published figures do; null: as drawn."""

    def build(self, device: torch.device) -> Reward:
        """The reward; wrong weights are a `WeightsError`."""
        from stage_rl.rewards.jpeg import OnJpeg

        reward = self.build_scorer(device)
        return reward if self.jpeg_quality is None else OnJpeg(reward, self.jpeg_quality)

    @abstractmethod
    def build_scorer(self, device: torch.device) -> Reward:
        """The reward on images as they are."""

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Drawn shapes of the prompt's colour and form against others; none for random weights."""
        from stage_rl.rewards.selftest import shape_cases

        return () if self.path == TINY else shape_cases()


class ClipScorerConfig(ScorerConfig):
    """Base of the rewards that are a cosine of CLIP."""

    # In bfloat16 cosines of one group would be equal: their spread is about 0.01.
    dtype: Literal["float32", "float16"] = "float32"
    """Precision of the towers."""

    @abstractmethod
    def load(self, device: torch.device) -> Clip:
        """The model that the cosine is taken with."""


class HpsConfig(ClipScorerConfig):
    """HPSv2.1: the cosine of a CLIP tuned on human preference, about 0.2 to 0.35."""

    path: str = "xswu/HPSv2"
    """Folder or hub id with the weights' file; tiny: random ones, whose scores mean nothing."""
    file: str = "HPS_v2.1_compressed.pt"
    """The weights in open_clip's layout. Those of version 2.0 give other numbers."""
    base: str = CLIP_H14
    """Folder or hub id of the CLIP that gives sizes and tokenizer."""

    def load(self, device: torch.device) -> Clip:
        """The tuned CLIP."""
        from stage_rl.rewards.clip import load_clip, load_open_clip

        if self.path == TINY:
            return load_clip(TINY, device=device, batch_size=self.batch_size)
        return load_open_clip(
            self.path,
            file=self.file,
            base=self.base,
            dtype=self.dtype,
            device=device,
            batch_size=self.batch_size,
        )

    def build_scorer(self, device: torch.device) -> Reward:
        """The plain cosine; reports multiply it by 100."""
        from stage_rl.rewards.clip import fitted_pixels
        from stage_rl.rewards.preference import CosineReward

        return CosineReward(self.load(device), fitted_pixels)


class PickScoreConfig(ClipScorerConfig):
    """PickScore: the scaled cosine of a CLIP tuned on choices of users, about 17 to 24."""

    path: str = "yuvalkirstain/PickScore_v1"
    tokenizer: str = CLIP_H14
    """Folder or hub id of the tokenizer."""

    def load(self, device: torch.device) -> Clip:
        """The tuned CLIP."""
        from stage_rl.rewards.clip import load_clip

        return load_clip(
            self.path,
            tokenizer=self.tokenizer,
            dtype=self.dtype,
            device=device,
            batch_size=self.batch_size,
        )

    def build_scorer(self, device: torch.device) -> Reward:
        """The cosine times the model's own scale; Flow-GRPO divides it by 26."""
        from stage_rl.rewards.preference import CosineReward

        clip = self.load(device)
        return CosineReward(clip, factor=clip.scale)


class ClipScoreConfig(ClipScorerConfig):
    """The plain cosine of CLIP, as T2I-CompBench takes it: neither scaled nor clipped."""

    path: str = "openai/clip-vit-base-patch32"

    def load(self, device: torch.device) -> Clip:
        """The CLIP."""
        from stage_rl.rewards.clip import load_clip

        return load_clip(self.path, dtype=self.dtype, device=device, batch_size=self.batch_size)

    def build_scorer(self, device: torch.device) -> Reward:
        """The cosine."""
        from stage_rl.rewards.preference import CosineReward

        return CosineReward(self.load(device))


class AestheticConfig(ClipScorerConfig):
    """LAION's improved aesthetic predictor on CLIP ViT-L/14, about 4 to 7; ignores the prompt."""

    path: str = CLIP_L14
    """Folder or hub id of the CLIP; tiny: random weights, which want a tiny head too."""
    head: str
    """The file sac+logos+ava1-l14-linearMSE.pth, or tiny for random weights."""

    def load(self, device: torch.device) -> Clip:
        """The CLIP."""
        from stage_rl.rewards.clip import load_clip

        return load_clip(self.path, dtype=self.dtype, device=device, batch_size=self.batch_size)

    def build_scorer(self, device: torch.device) -> Reward:
        """The rating of the head on CLIP's vectors."""
        from stage_rl.rewards.aesthetic import AestheticReward, load_head

        clip = self.load(device)
        return AestheticReward(clip, load_head(self.head, width=clip.width, device=device))

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """A photograph against noise; none for random weights."""
        from stage_rl.rewards.photographs import photograph_cases

        return () if TINY in (self.path, self.head) else photograph_cases()


class ImageRewardConfig(ScorerConfig):
    """ImageReward: human preference by a BLIP that reads image and prompt, about -2 to 2."""

    path: str = "THUDM/ImageReward"
    """Folder or hub id with ImageReward.pt and med_config.json; tiny: random weights."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Folder or hub id of the tokenizer."""

    def build_scorer(self, device: torch.device) -> Reward:
        """The reward."""
        from stage_rl.rewards.image_reward import ImageReward, load_image_reward

        model = load_image_reward(self.path, tokenizer=self.tokenizer, device=device)
        return ImageReward(model, self.batch_size)
