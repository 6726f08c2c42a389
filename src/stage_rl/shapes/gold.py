"""The strict judge of the shapes world, for evaluation only.

It counts whole shapes of one pure colour, as `inspect` finds them: smeared, merged and half objects
are not counted.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage_rl.rewards.base import Detection
from stage_rl.shapes.inspection import Inspection, Part, inspect
from stage_rl.shapes.scenes import Object

__all__ = ["Inspection", "Part", "gold_detections", "inspect", "matches_scene", "structure"]


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
