"""What a recipe says of the detectors behind the GenEval rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from stage_rl.prompts import CLASSES
from stage_rl.rewards.config_scorers import CLIP_L14, TINY
from stage_rl.schema import DetectorConfig
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.base import Detector
    from stage_rl.rewards.selftest import ReferenceCase


class Mask2FormerConfig(DetectorConfig):
    """GenEval's detector: Mask2Former for objects, CLIP for their colours."""

    path: str = "facebook/mask2former-swin-small-coco-instance"
    """Folder or hub id of the Mask2Former; tiny: random weights, which find nothing sensible."""
    clip: str = CLIP_L14
    """Folder or hub id of the CLIP that tells colours; tiny: random weights."""
    shortest_side: int = Field(default=800, ge=32)
    """Pixels that the shorter side of an image is scaled to."""
    longest_side: int = Field(default=1333, ge=32)
    """Most pixels of the longer side."""
    batch_size: int = Field(default=8, ge=1)
    """Images that go through the detector at once."""
    min_score: float = Field(default=0.05, ge=0, lt=1)
    """Detections at or below are not listed; keep it below the thresholds of the rules."""
    swap_rb: bool = False
    """Show the detector red as blue, as the released training rewards do by mistake."""
    jpeg_quality: int | None = Field(default=None, ge=1, le=100)
    """Look at the images as JPEG of this quality, as Flow-GRPO does (75); null: as drawn."""

    def build(self, device: torch.device) -> Detector:
        """The detector; wrong weights are a `WeightsError`."""
        from stage_rl.rewards.clip import load_clip
        from stage_rl.rewards.colors import ColorClassifier
        from stage_rl.rewards.detectors import MaskDetector, load_mask2former
        from stage_rl.rewards.jpeg import OnJpeg

        detector = MaskDetector(
            load_mask2former(self.path, device=device),
            ColorClassifier(load_clip(self.clip, device=device)),
            input_size=(self.shortest_side, self.longest_side),
            batch_size=self.batch_size,
            min_score=self.min_score,
            swap_rb=self.swap_rb,
        )
        return detector if self.jpeg_quality is None else OnJpeg(detector, self.jpeg_quality)

    def objection(self, prompt: Prompt) -> str | None:
        """That a clause asks for something that is never found; random weights take anything."""
        clauses = prompt.metadata.get("include") or ()
        unknown = [clause["class"] for clause in clauses if clause["class"] not in CLASSES]
        if self.path == TINY or not unknown:
            return None
        return f"finds the {len(CLASSES)} classes of GenEval, not '{unknown[0]}'"

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, and the cat in two colours; none for random weights."""
        from stage_rl.rewards.photographs import detector_cases

        return () if TINY in (self.path, self.clip) else detector_cases()
