"""The strict judge of the shapes world, for evaluation only.

It counts whole shapes of one pure colour, as `inspect` finds them: smeared, merged and half objects
are not counted.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage_rl.rewards.base import Detection
from stage_rl.shapes.inspection import Inspection, Part, inspect
from stage_rl.shapes.scenes import SIZES, TONES, Object, template

__all__ = [
    "Inspection",
    "Part",
    "gold_detections",
    "inspect",
    "looks_right",
    "matches_scene",
    "structure",
]


def structure(inspection: Inspection, metadata: Mapping[str, Any]) -> float:
    """S = mean over expected objects of (outline x purity x clean background)^(1/3); missing: 0."""
    scores: list[float] = []
    for clause in metadata["include"]:
        found = [p for p in inspection.parts if p.shape == clause["class"]]
        found.sort(key=lambda part: -part.outline * part.purity)
        terms = [_purity_for(part, clause) for part in found[: clause["count"]]]
        scores += [(term * inspection.clean) ** (1 / 3) for term in terms]
        scores += [0.0] * (clause["count"] - len(terms))
    return float(np.mean(scores))


def _purity_for(part: Part, clause: Mapping[str, Any]) -> float:
    """Outline x purity; a wrong colour is not pure."""
    right = clause.get("color") in (None, part.color)
    return part.outline * part.purity * right


def looks_right(
    inspection: Inspection, image_HWC: NDArray[np.uint8], metadata: Mapping[str, Any]
) -> bool:
    """Whether the objects have the size, and the background the tone, that a record names.

    The texture of a background is not judged: it is too faint to tell from light and clouds.
    """
    size, tone = metadata.get("size"), metadata.get("tone")
    objects = [part for part in inspection.parts if part.is_object]
    return (size is None or all(_radius(part) in SIZES[size] for part in objects)) and (
        tone is None or _tone(image_HWC, inspection.foreground_HW) == tone
    )


def _radius(part: Part) -> int:
    """The radius, of those that have a size's name, at which a shape fills the box of a part."""
    x0, y0, x1, y1 = part.box
    return min(
        (radius for radii in SIZES.values() for radius in radii),
        key=lambda radius: sum(
            abs(drawn - seen)
            for drawn, seen in zip(_sides(part.shape, radius), (y1 - y0, x1 - x0), strict=True)
        ),
    )


@functools.cache
def _sides(shape: str, radius: int) -> tuple[float, float]:
    """Height and width of the box of a shape; a pixel of a part is a sixth covered, or more."""
    covered = template(shape, radius) > 1 / 6
    return float(covered.any(1).sum()), float(covered.any(0).sum())


def _tone(image_HWC: NDArray[np.uint8], foreground_HW: NDArray[np.bool_]) -> str | None:
    """The tone whose hue is that of the background's median; None without a background."""
    if foreground_HW.all():
        return None
    seen = np.median(image_HWC[~foreground_HW], axis=0) / 255
    # Light and clouds shift the brightness alone.
    offsets = {name: np.std(seen - np.asarray(color, np.float32)) for name, color in TONES.items()}
    return min(offsets, key=lambda name: offsets[name])


def gold_detections(images_NHWC: NDArray[np.uint8]) -> list[list[Detection]]:
    """The whole objects of each image."""
    return [inspection.detections for inspection in inspect(images_NHWC)]


def matches_scene(detections: Sequence[Detection], objects: Sequence[Object]) -> bool:
    """Whether the detections are exactly the objects of a scene, by class, colour and place."""
    if len(detections) != len(objects):
        return False
    return all(
        any(
            d.label == o.shape
            and d.color == o.color
            and abs((d.box[0] + d.box[2]) / 2 - o.x - 0.5) <= 4
            and abs((d.box[1] + d.box[3]) / 2 - o.y - 0.5) <= 4
            for d in detections
        )
        for o in objects
    )
