"""What a reward and a detector are, and images of known order to test a reward with.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from stage_rl.distributed import pick_device
from stage_rl.settings import Component, Settings, name_of
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
    replies: tuple[str, ...] = ()
    """What a judge wrote word for word, kept with the scores of a benchmark."""


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


class Requirement(Settings):
    """What another reward must say of an image before a reward counts there."""

    reward: str
    """Name of the other reward."""
    at_least: float
    """Score from which on it counts; below, and where the other does not apply, it is 0."""


class RewardConfig(Component):
    """Base of the rewards."""

    family: ClassVar[str] = "reward"
    required_fields: ClassVar[tuple[str, ...]] = ()
    """Metadata a prompt must carry to be judged."""
    whole_groups: ClassVar[bool] = False
    """A call must hold all images of a prompt, and none of another group of that prompt."""
    changeable: ClassVar[tuple[str, ...]] = ("self_test", "timeout_s", "device")
    """Keys that change no score: a run may go on with other values of them."""

    times_itself: ClassVar[bool] = False
    """timeout_s is not that of a call: the reward itself sees to it."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]+$")
    """Column of this reward in metrics and reports; the kind where none is given."""
    weight: float = Field(default=1.0, ge=-1e9, le=1e9)
    """Factor of the score in the summed reward; 0 only logs it."""
    requires: Requirement | None = None
    """Counts only for images of which another reward says enough: {reward: NAME, at_least: 0.5};
    null: for all."""
    self_test: bool = True
    """Score reference images of known order before the first step; false: train without."""
    timeout_s: PositiveFloat = 3600.0
    """Longest time for the images of a step; then the run stops."""
    device: str | None = None
    """Where its models are, such as cuda:1, a GPU that no process trains on; null: the device of
    the training."""

    @model_validator(mode="before")
    @classmethod
    def _name_after_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            kind = name_of(cls.family, cls)
            return {**data, "name": kind.rpartition(":")[2]}
        return data

    def unsupported_reason(self, prompt: Prompt) -> str | None:
        """Why this reward cannot judge a prompt, in words that follow its name; None: it can."""
        return missing_field(prompt, self.required_fields)

    def missing(self) -> tuple[str, ...]:
        """The packages, programs and files that it needs and this machine lacks, in words; without
        weights.
        """
        return ()

    def kept_over(self) -> frozenset[str]:
        """Keys that change how kept replies are read, or how long an answer is tried for: scores
        that were kept are good under any values of them.
        """
        return frozenset()

    def effort(self) -> int:
        """How long an answer is tried for; a missing one is asked for again where it is more."""
        return 0

    def asked_of(self, prompt: Prompt) -> Any:
        """What of a prompt its scores depend on, as plain values."""
        return [prompt.text, dict(prompt.metadata)]

    def reread(self, prompt: Prompt, score: Score) -> Score:
        """A score that was kept, by what the reward makes of its replies today."""
        return score

    def device_or(self, device: torch.device) -> torch.device:
        """Its own device, else the one that is given."""
        if self.device is None:
            return device
        return pick_device(self.device, key=f"reward '{self.name}': device")

    @abstractmethod
    def build(self, device: torch.device) -> Reward:
        """The reward with its weights on a device."""

    def reference_cases(self) -> tuple[ReferenceCase, ...]:
        """Image pairs of known order for the self-test; none: the reward has no self-test."""
        return ()


def missing_field(prompt: Prompt, fields: Sequence[str]) -> str | None:
    """That a prompt lacks the first of these of its metadata, in words; None: it has them all."""
    missing = [field for field in fields if field not in prompt.metadata]
    return f"needs '{missing[0]}', which this prompt lacks" if missing else None


# The self-test, before a reward steers a training. A model that is loaded wrongly still gives
# numbers; on a pair such as a red square and a blue one for "a red square" it gives them the wrong
# way round, or the same one twice.


@dataclass(frozen=True)
class ReferenceCase:
    """Two images of one size, the first of which suits the prompt better beyond doubt."""

    prompt: Prompt
    """With all metadata that the reward requires."""
    better_image: Image.Image
    worse_image: Image.Image
    what: str
    """The two images in words, such as: a red square against a blue one."""

    def resized(self, side: int) -> ReferenceCase:
        """The same images as squares of so many pixels along a side."""
        better, worse = (one.resize((side, side)) for one in (self.better_image, self.worse_image))
        return replace(self, better_image=better, worse_image=worse)

    def images_NHWC(self) -> Tensor:
        """The better and the worse image as a reward gets them: RGB, uint8, on the CPU."""
        pair = (self.better_image, self.worse_image)
        return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in pair]))


IMAGE_SIZE = 384
"""Pixels along a side of the reference images that are drawn."""

SHAPES = (
    ("red", "square", "blue", "square"),
    ("blue", "square", "red", "square"),
    ("green", "circle", "green", "triangle"),
)
"""Colour and shape of the better image, then of the worse. The first two are the same images in
both orders, which catches a reward that overlooks the prompt."""


def shape_cases(
    shapes: tuple[tuple[str, str, str, str], ...] = SHAPES,
) -> tuple[ReferenceCase, ...]:
    """Drawn shapes: the prompt names colour and shape of the first image, not of the second."""
    return tuple(
        ReferenceCase(
            Prompt(f"a {color} {shape}", index),
            shape_image(shape, color),
            shape_image(other_shape, other_color),
            f"a {color} {shape} against a {other_color} {other_shape}",
        )
        for index, (color, shape, other_color, other_shape) in enumerate(shapes)
    )


def shape_image(shape: str, color: str) -> Image.Image:
    """A square, circle or triangle over the middle half of a white image; colours as PIL's."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    draw = ImageDraw.Draw(image)
    near, far = IMAGE_SIZE // 4, 3 * IMAGE_SIZE // 4
    if shape == "square":
        draw.rectangle((near, near, far, far), fill=color)
    elif shape == "circle":
        draw.ellipse((near, near, far, far), fill=color)
    else:
        assert shape == "triangle", shape
        draw.polygon(((IMAGE_SIZE // 2, near), (near, far), (far, far)), fill=color)
    return image


def cat_or_cup_cases() -> tuple[ReferenceCase, ...]:
    """Photographs of a cat and a cup, for what drawings are no fair test of; either once better."""
    return (
        _photograph_case(0, "cat", photograph("cup"), "a cat against a cup"),
        _photograph_case(1, "cup", photograph("cat"), "a cup against a cat"),
    )


def noise_cases() -> tuple[ReferenceCase, ...]:
    """Photographs against noise, for rewards that rate the image alone or miss what is absent."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 384, 3), dtype=np.uint8)
    return tuple(
        _photograph_case(
            index, name, Image.fromarray(noise), f"a photograph of a {name} against noise"
        )
        for index, name in enumerate(("cat", "cup"))
    )


def photograph(name: str) -> Image.Image:
    """The photograph (CC0, 384 x 256) of a cat or a cup."""
    file = resources.files("stage_rl") / "rewards" / "reference" / f"{name}.jpg"
    with file.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def _photograph_case(index: int, name: str, worse: Image.Image, what: str) -> ReferenceCase:
    """A photograph against another image, with the metadata of a T2I-R1 prompt for one object."""
    prompt = Prompt(f"a photo of a {name}", index, {"task_type": "object", "nouns": [name]})
    return ReferenceCase(prompt, photograph(name), worse, what)
