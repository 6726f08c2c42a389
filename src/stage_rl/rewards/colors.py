"""The colour of an object by CLIP, as GenEval tells it.

Shape suffixes: B objects, K colours, D joint width, H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stage_rl.prompts import COLORS
from stage_rl.rewards.clip import Clip, clip_pixels
from stage_rl.rewards.instances import Instance

BACKGROUND = 153
"""Grey level of the pixels that do not belong to the object (#999)."""
UNKNOWN = "unknown"
"""The colour of an object without pixels."""


class ColorClassifier:
    """Names the colour of objects. Keeps the text vectors of the classes it has met."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._texts_KD: dict[str, Tensor] = {}

    def __call__(
        self, image_HWC: Tensor, instances: Sequence[Instance], class_name: str
    ) -> list[str]:
        """The colour of each object of one class in an image (uint8, on the CPU)."""
        crops = [cut_out(image_HWC, instance) for instance in instances]
        seen = [crop for crop in crops if crop is not None]
        names = iter(self._names(seen, class_name))
        return [UNKNOWN if crop is None else next(names) for crop in crops]

    def _names(self, crops: Sequence[Tensor], class_name: str) -> list[str]:
        """The nearest colour of each crop, the first in the order of GenEval where two are."""
        if not crops:
            return []
        # The crops differ in size, so each is brought to CLIP's own before they share a batch.
        pixels = torch.cat([clip_pixels(crop_HWC[None], self._clip.side) for crop_HWC in crops])
        cosines_BK = self._clip.pixels_ND(pixels) @ self._color_vectors(class_name).T
        return [COLORS[k] for k in cosines_BK.argmax(-1).tolist()]

    def _color_vectors(self, class_name: str) -> Tensor:
        """One vector per colour: the mean of three sentences."""
        if class_name not in self._texts_KD:
            sentences = [
                sentence for color in COLORS for sentence in sentences_of(color, class_name)
            ]
            vectors_KSD = self._clip.texts_MD(sentences).unflatten(0, (len(COLORS), -1))
            self._texts_KD[class_name] = normalize(vectors_KSD.mean(1), dim=-1)
        return self._texts_KD[class_name]


def sentences_of(color: str, class_name: str) -> tuple[str, str, str]:
    """The sentences that stand for a colour."""
    return (
        f"a photo of a {color} {class_name}",
        f"a photo of a {color}-colored {class_name}",
        f"a photo of a {color} object",
    )


def cut_out(image_HWC: Tensor, instance: Instance) -> Tensor | None:
    """The object's box of an image with grey around the mask; None for a box without area."""
    left, top, right, bottom = (round(side) for side in instance.box)
    if right <= left or bottom <= top:
        return None
    mask_HW1 = instance.mask_HW.cpu()[..., None]
    masked_HWC = torch.where(mask_HW1, image_HWC, image_HWC.new_tensor(BACKGROUND))
    return masked_HWC[top:bottom, left:right]
