"""The rules of T2I-CompBench (arXiv 2307.06350, 2404.01247): from what models see to a score.

Nothing here runs a model. A box is x0, y0, x1, y1 in pixels, an image size (width, height).

Shape suffixes: H x W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage_rl.rewards.base import Detection, Score
from stage_rl.rewards.t2i_r1 import RELEASED_SIDES, Box, Compat, Size, iou, position_score

SHORT_SIDE = 479
"""Pixels of the shorter side at which the published evaluator measures distances."""
NEAR_SIZE = (512, 512)
"""The image size at which `position_score` calls 150 pixels near, as the evaluator does."""
LEAST = 0.5
"""A score in the plane below this is 0."""
SAME_BOX = 0.9
"""Overlap above which two boxes of one label are one object."""
BEHIND = ("behind", "hidden", "hidden by")
MAX_WORDS = 50
"""Words of a question that are asked."""


def question_of(phrase: str) -> str:
    """A noun phrase as the published evaluator asks for it: small letters, without marks."""
    plain = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip()
    return " ".join(plain.split(" ")[:MAX_WORDS])


def attribute_score(shares: Sequence[float], phrases: Sequence[str]) -> Score:
    """The product of the probabilities of yes over the phrases, each with four decimals."""
    told = [round(share, 4) for share in shares]
    why = ", ".join(f"{name}: {share:.2f}" for name, share in zip(phrases, told, strict=True))
    return Score(float(np.prod(told)), why)


def plane_score(
    detections: Sequence[Detection],
    info: Mapping[str, str],
    *,
    size: Size,
    threshold: float,
    trusted: bool,
    compat: Compat = "fixed",
) -> Score:
    """A quarter of each object's confidence and half for their relation; below 0.5 it is 0.

    `trusted` lets what is above the threshold count in full, as for a detector whose confidences
    are not those that the rule was made for; then 0.5, which no relation adds to, is 0 as well.
    Released: "on top of" is a relation that never holds.
    """
    found = _best(detections, info, threshold)
    shares = {name: 1.0 if trusted else one.score for name, one in found.items()}
    if len(found) < 2:
        return _cut(_placed(info, shares, 0.0), trusted=trusted)
    scale = SHORT_SIDE / min(size)
    first, second = (_scaled(found[info[key]].box, scale) for key in ("obj1", "obj2"))
    position = position_score(info["locality"], first, second, size=NEAR_SIZE)
    if compat == "release" and info["locality"] not in RELEASED_SIDES:
        position = 0.0
    return _cut(_placed(info, shares, position), trusted=trusted)


def depth_score(
    detections: Sequence[Detection],
    info: Mapping[str, str],
    *,
    depth_HW: NDArray[np.float32],
    threshold: float,
    trusted: bool,
    compat: Compat = "fixed",
) -> Score:
    """The same in depth, with larger values nearer: right order and overlap count, without a cut.

    An overlap of half or more counts in full, a smaller one in proportion, none at all as 0.
    Released: depth is looked up with both axes exchanged, and an overlap of just half is 0.
    """
    found = _best(detections, info, threshold)
    shares = {name: 1.0 if trusted else one.score for name, one in found.items()}
    if len(found) < 2:
        return _placed(info, shares, 0.0)
    first, second = (found[info[key]].box for key in ("obj1", "obj2"))
    looked_up = depth_HW.T if compat == "release" else depth_HW
    nearness = [_mean_depth(box, looked_up) for box in (first, second)]
    in_order = nearness[0] > nearness[1]
    if info["locality"] in BEHIND:
        in_order = nearness[0] < nearness[1]
    overlap = iou(first, second)
    overlap = 0.0 if compat == "release" and overlap == 0.5 else overlap
    position = min(overlap / 0.5, 1.0) if in_order else 0.0
    return _placed(info, shares, position)


def numeracy_score(
    detections: Sequence[Detection], items: Sequence[Mapping[str, Any]], *, threshold: float
) -> Score:
    """The mean over the items: half for being there, half for the exact number."""
    total, reasons = 0.0, []
    for item in items:
        boxes = [
            one.box
            for one in sorted(detections, key=lambda one: -one.score)
            if one.label == item["obj_name"] and one.score > threshold
        ]
        count = len(distinct_boxes(boxes))
        total += (0.5 if count else 0.0) + (0.5 if count == item["num"] else 0.0)
        reasons.append(f"{count} of {item['num']} {item['obj_name']}")
    return Score(total / len(items), ", ".join(reasons))


def distinct_boxes(boxes: Sequence[Box]) -> list[Box]:
    """Boxes in order without those that nearly are, contain or lie in an earlier one."""
    kept: list[Box] = []
    for box in boxes:
        if all(max(_shares(box, other)) <= SAME_BOX for other in kept):
            kept.append(box)
    return kept


def _shares(a: Box, b: Box) -> tuple[float, float, float]:
    """Intersection over union, and over either area; borders count as a pixel, as published."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return inside / (sum(areas) - inside), inside / areas[0], inside / areas[1]


def _best(
    detections: Sequence[Detection], info: Mapping[str, str], threshold: float
) -> dict[str, Detection]:
    """The most confident detection of each of the two things that is above the threshold."""
    best: dict[str, Detection] = {}
    for one in sorted(detections, key=lambda one: -one.score):
        if one.label in (info["obj1"], info["obj2"]) and one.score > threshold:
            best.setdefault(one.label, one)
    return best


def _placed(info: Mapping[str, str], shares: Mapping[str, float], position: float) -> Score:
    value = 0.25 * sum(shares.values()) + position / 2
    missing = [info[key] for key in ("obj1", "obj2") if info[key] not in shares]
    relation = f"{info['obj1']} {info['locality']} {info['obj2']}: {position:.2f}"
    why = f"no {', no '.join(missing)}" if missing else relation
    return Score(value, why)


def _cut(score: Score, *, trusted: bool) -> Score:
    assert score.value is not None
    least = score.value <= LEAST if trusted else score.value < LEAST
    return Score(0.0, score.why) if least else score


def _scaled(box: Box, scale: float) -> Box:
    x0, y0, x1, y1 = (scale * side for side in box)
    return x0, y0, x1, y1


def _mean_depth(box: Box, depth_HW: NDArray[np.float32]) -> float:
    """The mean over the pixels of a box, of at least one."""
    height, width = depth_HW.shape
    x0, y0 = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    return float(depth_HW[y0 : max(int(box[3]), y0 + 1), x0 : max(int(box[2]), x0 + 1)].mean())
