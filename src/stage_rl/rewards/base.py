"""What a reward and a detector are.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stage_rl.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


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
