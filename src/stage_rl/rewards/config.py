"""What a recipe says of the built-in rewards."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from stage_rl.rewards.config_detectors import Mask2FormerConfig
from stage_rl.schema import DetectorConfig, RewardConfig
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.geneval import GenEvalReward
    from stage_rl.rewards.selftest import ReferenceCase


class GenEvalRewardConfig(RewardConfig):
    """The GenEval rules on what a detector finds."""

    required_fields: ClassVar[tuple[str, ...]] = ("tag", "include")

    detector: DetectorConfig = Mask2FormerConfig()
    """What finds the objects and their colours."""
    score: Literal["soft", "correct", "strict"] = "soft"
    """soft: the mean over the terms; correct: the official verdict, 0 or 1; strict: the same with
    exact counts."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: the released score, which adds 1 to a missed relation."""
    clip_count: bool | None = None
    """Count terms end at 0; null: in the fixed form only."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Confidence above which an object counts."""
    counting_threshold: float = Field(default=0.9, ge=0, lt=1)
    """The same for counting prompts."""
    max_objects: int = Field(default=16, ge=1)
    """Most confident objects of a class that are looked at."""

    def build(self, device: torch.device) -> GenEvalReward:
        """The reward with its detector on a device."""
        from stage_rl.rewards.geneval import GenEvalReward, judge

        rules = functools.partial(
            judge,
            compat=self.compat,
            clip_count=self.clip_count,
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
            max_objects=self.max_objects,
        )
        return GenEvalReward(self.detector.build(device), rules, self.score)

    def objection(self, prompt: Prompt) -> str | None:
        """Also what the detector cannot find."""
        return super().objection(prompt) or self.detector.objection(prompt)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Those of the detector: the rules themselves need no weights."""
        return self.detector.reference_cases()
