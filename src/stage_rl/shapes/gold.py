"""The strict judge of the shapes world: analytic, from pixels, for evaluation only.

Everything that is not background is split into connected parts. A part is an object when its colour
is one of the ten, pure, and its outline is that of one whole shape: smeared, merged and half
objects fit no outline and are not counted.

Shape suffixes: N images, H x W pixels, C colour channels, M parts, K outlines, S shifts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from stage_rl.rewards.base import Detection
from stage_rl.shapes.scenes import COLORS, RADII, SHAPES, TEMPLATE_SIZE, TONES, template

FOREGROUND = 0.13
"""Colour distance from every background tone above which a pixel belongs to something drawn."""
TONE_RANGE = 0.14
"""Brightness by which a background may stray from its tone."""
MIN_AREA = 12
"""Parts with fewer pixels are specks, not parts."""
MIN_OUTLINE = 0.84
"""Overlap (soft intersection over union) with the best whole shape that makes an object."""
MIN_PURITY = 0.85
PURE = 0.22
"""Colour distance within which a pixel has the part's colour, mixed with background at its edge."""

_PALETTE = np.asarray(list(COLORS.values()), np.float32)
_TONES = np.asarray(list(TONES.values()), np.float32)
_HALF = TEMPLATE_SIZE // 2


@dataclass(frozen=True)
class Part:
    """One connected thing in an image."""

    shape: str
    outline: float
    """Soft intersection over union with the best-fitting whole shape."""
    color: str
    purity: float
    """Share of its pixels that have the colour."""
    box: tuple[float, float, float, float]
    area: int

    @property
    def is_object(self) -> bool:
        """Whether it is one whole shape of one colour."""
        return self.outline >= MIN_OUTLINE and self.purity >= MIN_PURITY


@dataclass(frozen=True)
class Inspection:
    """What the judge sees in one image."""

    parts: tuple[Part, ...]
    foreground_HW: NDArray[np.bool_]
    clean: float
    """Share of the pixels outside whole objects that are background."""

    @property
    def detections(self) -> list[Detection]:
        """The whole objects, as the GenEval rules take them."""
        return [Detection(p.shape, 1.0, p.box, p.color) for p in self.parts if p.is_object]


def _centred(shape_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """A template with the middle of its box, not of its circle, in the middle."""
    rows, columns = np.nonzero(shape_HW > 0.4)
    shift = [_HALF - (int(line.min()) + int(line.max())) // 2 for line in (rows, columns)]
    return np.roll(shape_HW, shift, (0, 1))


@functools.cache
def _outlines() -> tuple[NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]]:
    """Whole shapes as rows (K x pixels), the shape of each row, and its squared norm."""
    rows = [(_centred(template(s, r)).ravel(), i) for i, s in enumerate(SHAPES) for r in RADII]
    bank = np.stack([row for row, _ in rows])
    return bank, np.asarray([i for _, i in rows]), (bank * bank).sum(1)


def _tone_distance(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance of each pixel from the nearest background colour, NHW."""
    offsets = images[..., None, :] - _TONES
    brightness = np.clip(offsets.mean(-1, keepdims=True), -TONE_RANGE, TONE_RANGE)
    return np.linalg.norm(offsets - brightness, axis=-1).min(-1)


def _crop(plane: NDArray[Any], row: int, column: int) -> NDArray[Any]:
    """A square of TEMPLATE_SIZE + 2 around a pixel, zero outside the image."""
    reach = _HALF + 1
    padded = np.pad(plane, [(reach, reach), (reach, reach)] + [(0, 0)] * (plane.ndim - 2))
    return padded[row : row + TEMPLATE_SIZE + 2, column : column + TEMPLATE_SIZE + 2]


def _fit(alpha: NDArray[np.float32]) -> tuple[str, float]:
    """The whole shape that overlaps most with a part's coverage, over shifts of one pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(alpha, (TEMPLATE_SIZE, TEMPLATE_SIZE))
    parts_SX = windows.reshape(-1, TEMPLATE_SIZE * TEMPLATE_SIZE)
    bank, shape_of, norms_K = _outlines()
    inner_SK = parts_SX @ bank.T
    # What a window cuts off still counts against the fit.
    overlap_SK = inner_SK / ((alpha * alpha).sum() + norms_K - inner_SK)
    best = int(overlap_SK.max(0).argmax())
    return SHAPES[shape_of[best]], float(overlap_SK[:, best].max())


def _part(
    image: NDArray[np.float32], mask: NDArray[np.bool_], background: NDArray[np.float32]
) -> Part:
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    pixels = image[mask]
    distance = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1)
    color = int(np.bincount(distance.argmin(1), minlength=len(_PALETTE)).argmax())
    along = _PALETTE[color] - background
    alpha = np.clip(((image - background) @ along) / (along @ along), 0, 1)
    # One pixel more than the mask: the faint rim of an object is still its own.
    alpha = np.where(ndimage.binary_dilation(mask), alpha, 0).astype(np.float32)
    mixed = background + alpha[mask][:, None] * along
    purity = float((np.linalg.norm(pixels - mixed, axis=-1) < PURE).mean())
    middle = (box[1] + box[3] - 1) // 2, (box[0] + box[2] - 1) // 2
    window = _crop(alpha, *middle)
    shape, outline = _fit(window)
    outside = 1 - window.sum() / max(alpha.sum(), 1e-6)
    x0, y0, x1, y1 = (float(v) for v in box)
    return Part(
        shape=shape,
        outline=outline * (1 - float(outside)),
        color=list(COLORS)[color],
        purity=purity,
        box=(x0, y0, x1, y1),
        area=len(rows),
    )


def inspect(images_NHWC: NDArray[np.uint8]) -> list[Inspection]:
    """Takes images apart; uint8, 48 x 48."""
    images = images_NHWC.astype(np.float32) / 255
    foreground = _tone_distance(images) > FOREGROUND
    return [_inspect(image, mask) for image, mask in zip(images, foreground, strict=True)]


def _inspect(image: NDArray[np.float32], foreground: NDArray[np.bool_]) -> Inspection:
    labels, count = ndimage.label(foreground)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    empty = ~ndimage.binary_dilation(foreground)
    background = np.median(image[empty if empty.any() else ~foreground], axis=0)
    parts, whole = [], np.zeros_like(foreground)
    for label in range(1, count + 1):
        if sizes[label] < MIN_AREA:
            continue
        mask = labels == label
        part = _part(image, mask, background)
        parts.append(part)
        if part.is_object:
            whole |= mask
    clean = float((~foreground[~whole]).mean()) if not whole.all() else 0.0
    return Inspection(tuple(parts), foreground, clean)


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


def matches_scene(detections: Sequence[Detection], objects: Sequence[Any]) -> bool:
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
