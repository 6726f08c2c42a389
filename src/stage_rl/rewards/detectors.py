"""GenEval's detector: Mask2Former finds the objects, CLIP tells their colours.

Shape suffixes: N images, H x W pixels, C colour channels, Q queries, K classes, Y x X of the mask
logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Mask2FormerForUniversalSegmentation

from stage_rl.errors import WeightsError
from stage_rl.prompts import CLASSES
from stage_rl.rewards.base import Detection
from stage_rl.rewards.colors import ColorClassifier
from stage_rl.rewards.instances import Instance, Size, find_instances
from stage_rl.rewards.pixels import detr_pixels
from stage_rl.rewards.tiny import TINY, tiny_mask2former
from stage_rl.rewards.weights import SWIN_UNREAD, load_model
from stage_rl.types import Prompt

STRIDE = 32
"""Both sides of the model's input are multiples of this."""
UNREAD = rf"{SWIN_UNREAD}|^criterion\."
"""Tensors beside those of a forward pass: the backbone's last norm and the weights of the loss."""


class MaskDetector:
    """Finds GenEval's 80 classes by the outputs' order, not by the model's own names for them.

    Only what a prompt gives a colour to is looked at for its colour.
    """

    def __init__(
        self,
        module: Mask2FormerForUniversalSegmentation,
        colors: ColorClassifier,
        *,
        input_size: Size,
        batch_size: int,
        min_score: float,
        swap_rb: bool,
    ) -> None:
        self._module: Any = module
        self._colors = colors
        self._input_size = input_size
        self._batch_size = batch_size
        self._min_score = min_score
        self._swap_rb = swap_rb

    def __call__(self, images_NHWC: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """The detections of each image, most confident first, down to the lowest score kept."""
        assert len(images_NHWC) == len(prompts)
        found: list[list[Detection]] = []
        for first in range(0, len(images_NHWC), self._batch_size):
            images = images_NHWC[first : first + self._batch_size]
            instances = self.instances(images)
            for image_HWC, objects in zip(images, instances, strict=True):
                prompt = prompts[len(found)]
                found.append(self._detections(image_HWC, objects, prompt.metadata))
        return found

    @torch.inference_mode()
    def instances(self, images_NHWC: Tensor) -> list[list[Instance]]:
        """The instances of each image, in one batch."""
        images = images_NHWC.flip(-1) if self._swap_rb else images_NHWC
        shortest, longest = self._input_size
        pixels = detr_pixels(images, shortest=shortest, longest=longest, device=self._module.device)
        height, width = pixels.shape[-2:]
        padded = pad(pixels, (0, -width % STRIDE, 0, -height % STRIDE))
        output = self._module(pixel_values=padded)
        return [
            find_instances(
                class_logits_QK,
                mask_logits_QYX,
                padded=(padded.shape[-2], padded.shape[-1]),
                resized=(height, width),
                image=(images.shape[1], images.shape[2]),
                min_score=self._min_score,
            )
            for class_logits_QK, mask_logits_QYX in zip(
                output.class_queries_logits, output.masks_queries_logits, strict=True
            )
        ]

    def _detections(
        self, image_HWC: Tensor, instances: Sequence[Instance], metadata: Mapping[str, Any]
    ) -> list[Detection]:
        """The instances by name, with the colours that the metadata's clauses ask about."""
        colors: dict[int, str] = {}
        for name in _colored(metadata):
            places = [i for i, one in enumerate(instances) if CLASSES[one.label] == name]
            told = self._colors(image_HWC, [instances[i] for i in places], name)
            colors |= dict(zip(places, told, strict=True))
        return [
            Detection(CLASSES[one.label], one.score, one.box, colors.get(place))
            for place, one in enumerate(instances)
        ]


def load_mask2former(
    path: str, *, device: torch.device | str = "cpu"
) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former of 80 classes in COCO's order, fp32, from a folder or hub id; `tiny`: random.

    Another number of classes is a `WeightsError`.
    """
    if path == TINY:
        module = tiny_mask2former()
        nn.Module.to(module, device)
        return module
    module = load_model(Mask2FormerForUniversalSegmentation, path, device=device, unread=UNREAD)
    if module.config.num_labels != len(CLASSES):
        raise WeightsError(
            f"{path}: knows {module.config.num_labels} classes; GenEval needs the {len(CLASSES)} "
            "of COCO, as in facebook/mask2former-swin-small-coco-instance"
        )
    return module


def _colored(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a clause of GenEval metadata gives a colour to."""
    clauses = metadata.get("include") or ()
    return tuple(dict.fromkeys(c["class"] for c in clauses if c.get("color") is not None))
