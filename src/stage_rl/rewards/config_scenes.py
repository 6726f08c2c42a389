"""What a recipe says of the rewards that look for objects and ask questions; free of torch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from stage_rl.rewards.config_scorers import TINY
from stage_rl.schema import DetectorConfig, RewardConfig
from stage_rl.settings import Count, complaint
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.rewards.git_vqa import GitReward
    from stage_rl.rewards.grounding_dino import GroundingDino, SceneReward
    from stage_rl.rewards.selftest import ReferenceCase
    from stage_rl.rewards.yes_no import YesNoReward

PAIR = ("cat", "cup")
"""What the photographs for self-tests show."""


class GroundingDinoDetectorConfig(DetectorConfig):
    """GroundingDINO asked for the nouns of each prompt."""

    path: str = "IDEA-Research/grounding-dino-tiny"
    """Folder or hub id; tiny: random weights, for smoke runs."""
    shortest_side: Count = 800
    """Pixels that the shorter side of an image is scaled to."""
    longest_side: Count = 1333
    """Most pixels along the longer side."""
    batch_size: Count = 8
    """Images at a time."""
    min_score: float = Field(default=0.05, ge=0, lt=1)
    """Boxes of at most this confidence are left out."""

    def build(self, device: torch.device) -> GroundingDino:
        """The detector with its weights on a device."""
        from stage_rl.rewards.grounding_dino import load_grounding_dino

        return load_grounding_dino(
            self.path,
            device=device,
            shortest_side=self.shortest_side,
            longest_side=self.longest_side,
            batch_size=self.batch_size,
            min_score=self.min_score,
        )


class GroundingDinoRewardConfig(RewardConfig):
    """The T2I-R1 rules on the objects that a detector finds."""

    required_fields: ClassVar[tuple[str, ...]] = ("task_type", "nouns")

    detector: DetectorConfig = GroundingDinoDetectorConfig()
    """What finds the nouns of a prompt."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: the released score, in which relations such as above never count."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Confidence above which an object counts."""

    @model_validator(mode="after")
    def _sees_what_counts(self) -> Self:
        detector = self.detector
        if (
            isinstance(detector, GroundingDinoDetectorConfig)
            and detector.min_score > self.threshold
        ):
            text = f"{detector.min_score} leaves out what the threshold of {self.threshold} counts"
            raise complaint("detector.min_score", f"{text}; write at most {self.threshold}")
        return self

    def objection(self, prompt: Prompt) -> str | None:
        """Also why a spatial or a numeracy prompt cannot be judged."""
        from stage_rl.rewards.t2i_r1 import scene_objection

        missing = super().objection(prompt)
        return missing or scene_objection(prompt.metadata, compat=self.compat)

    def build(self, device: torch.device) -> SceneReward:
        """The reward with its detector on a device."""
        from stage_rl.rewards.grounding_dino import SceneReward
        from stage_rl.rewards.t2i_r1 import judge_scene

        rules = functools.partial(judge_scene, compat=self.compat, threshold=self.threshold)
        return SceneReward(self.detector.build(device), rules)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs against noise, for who asks for a cat or a cup; none for random weights."""
        from stage_rl.rewards.photographs import photograph_cases

        detector = self.detector
        if not isinstance(detector, GroundingDinoDetectorConfig) or detector.path == TINY:
            return ()
        pairs = zip(photograph_cases(), PAIR, strict=True)
        return tuple(_asking(case, noun) for case, noun in pairs)


class GitRewardConfig(RewardConfig):
    """GIT asked for each attribute or noun of a prompt whether it is there."""

    required_fields: ClassVar[tuple[str, ...]] = ("task_type", "nouns")

    path: str = "microsoft/git-large-vqav2"
    """Folder or hub id; tiny: random weights, for smoke runs."""
    compat: Literal["fixed", "release"] = "fixed"
    """release: 0 for spatial and numeracy prompts, to which the reward does not apply."""
    batch_size: Count = 8
    """Images at a time, each with all its questions."""

    def build(self, device: torch.device) -> GitReward:
        """The reward with its weights on a device."""
        from stage_rl.rewards.git_vqa import GitReward, load_git

        model = load_git(self.path, batch_size=self.batch_size, device=device)
        return GitReward(model, self.compat)

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, asked for by name; none for random weights."""
        return () if self.path == TINY else _cat_or_cup()


class YesNoRewardConfig(RewardConfig):
    """A yes-or-no question to any image-text-to-text model that has a chat template."""

    path: str
    """Folder or hub id; tiny: random weights, for smoke runs."""
    question: str = "Does this image show {prompt}? Please answer yes or no without explanation."
    """What is asked; {prompt} stands for the prompt's text."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Precision of the model."""
    batch_size: Count = 8
    """Images at a time."""

    @model_validator(mode="after")
    def _asks_for_the_prompt(self) -> Self:
        if "{prompt}" not in self.question:
            raise complaint("question", "does not name the prompt; write {prompt} in it")
        return self

    def build(self, device: torch.device) -> YesNoReward:
        """The reward with its weights on a device."""
        from stage_rl.rewards.yes_no import load_yes_no

        return load_yes_no(
            self.path,
            question=self.question,
            dtype=self.dtype,
            batch_size=self.batch_size,
            device=device,
        )

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Photographs of a cat and a cup, asked for by name; none for random weights."""
        return () if self.path == TINY else _cat_or_cup()


def _cat_or_cup() -> tuple[ReferenceCase, ...]:
    """Either photograph against the other."""
    from stage_rl.rewards.photographs import photograph
    from stage_rl.rewards.selftest import ReferenceCase

    return tuple(
        _asking(
            ReferenceCase(
                Prompt(f"a photo of a {noun}", index),
                photograph(noun),
                photograph(other),
                f"a {noun} against a {other}",
            ),
            noun,
        )
        for index, (noun, other) in enumerate((PAIR, PAIR[::-1]))
    )


def _asking(case: ReferenceCase, noun: str) -> ReferenceCase:
    """The case with the metadata of a T2I-R1 prompt for one object."""
    metadata = {"task_type": "object", "nouns": [noun]}
    return replace(case, prompt=replace(case.prompt, metadata=metadata))
