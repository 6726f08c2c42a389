"""What a reward and a detector are.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from stage_rl.settings import Component, name_of
from stage_rl.types import Prompt


@dataclass(frozen=True)
class Score:
    """One reward's word on one image."""

    value: float | None
    """None: the reward does not apply to the prompt; the term drops out for the whole group."""
    why: str
    """The reason in one sentence, for the report."""
    extras: Mapping[str, float] = field(default_factory=dict)
    """Further numbers to log beside the value, such as a strict verdict."""


class Reward(Protocol):
    """Scores images; what `RewardConfig.build` returns."""

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        """One score per image (uint8), in order; `prompts[n]` is what image n was drawn for."""
        ...


@dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    label: str
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels."""
    color: str | None = None


class Detector(Protocol):
    """Finds objects; what `DetectorConfig.build` returns."""

    def __call__(self, images_NHWC: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """The detections of each image, most confident first, unfiltered by threshold."""
        ...


class DetectorConfig(Component):
    """Base of the object detectors that a reward can be given."""

    family: ClassVar[str] = "detector"

    @abstractmethod
    def build(self, device: torch.device) -> Detector:
        """The detector with its weights on a device."""

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """Why this detector cannot find what a prompt asks for; None: it can."""
        return None

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Image pairs that the GenEval rules must order with this detector; none by default."""
        return ()


class RewardConfig(Component):
    """Base of the rewards."""

    family: ClassVar[str] = "reward"
    required_fields: ClassVar[tuple[str, ...]] = ()
    """Metadata a prompt must carry to be judged."""
    whole_groups: ClassVar[bool] = False
    """A call must hold all images of a prompt, and none of another group of that prompt."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]+$")
    """Column of this reward in metrics and reports; the kind where none is given."""
    weight: float = 1.0
    """Factor of the score in the summed reward; 0 only logs it."""
    self_test: bool = True
    """Score reference images of known order before the first step; false: train without."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            kind = name_of(cls.family, cls)
            return {**data, "name": kind.rpartition(":")[2]}
        return data

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """Why this reward cannot judge a prompt, in words that follow its name; None: it can."""
        missing = [field for field in self.required_fields if field not in prompt.metadata]
        return f"needs '{missing[0]}', which this prompt lacks" if missing else None

    @abstractmethod
    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Image pairs of known order for the self-test; none: the reward has no self-test."""
        return ()


@dataclass(frozen=True)
class ReferenceCase:
    """Two images of one size, the first of which suits the prompt better beyond doubt."""

    prompt: Prompt
    """With all metadata that the reward requires."""
    better_image: Image.Image
    worse_image: Image.Image
    what: str
    """The two images in words, such as: a red square against a blue one."""

    def images_NHWC(self) -> Tensor:
        """The better and the worse image as a reward gets them: RGB, uint8, on the CPU."""
        pair = (self.better_image, self.worse_image)
        return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in pair]))
