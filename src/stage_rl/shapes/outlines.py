"""Finds the whole shape whose outline lies closest to a coverage.

Shape suffixes: H x W pixels, M coverages, K shifted outlines.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stage_rl.shapes.scenes import RADII, SHAPES, TEMPLATE_SIZE, template

_HALF = TEMPLATE_SIZE // 2


def _centred(shape_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """A template with the middle of its box, not of its circle, in the middle."""
    rows, columns = np.nonzero(shape_HW > 0.4)
    shift = [_HALF - (int(line.min()) + int(line.max())) // 2 for line in (rows, columns)]
    return np.roll(shape_HW, shift, (0, 1))


@functools.cache
def _outlines() -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Whole shapes, shifted by up to one pixel, as rows (K x pixels), and the shape of each row."""
    rows, shapes = [], []
    for index, shape in enumerate(SHAPES):
        for radius in RADII:
            padded = np.pad(_centred(template(shape, radius)), 1)
            shifts = [np.roll(padded, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            rows += [shifted.ravel() for shifted in shifts]
            shapes += [index] * len(shifts)
    return np.stack(rows), np.asarray(shapes)


@dataclass(frozen=True)
class Fit:
    """The whole shape that overlaps most with each coverage."""

    shape_M: NDArray[np.intp]
    outline_M: NDArray[np.float32]
    """Soft intersection over union."""
    mismatch_M: NDArray[np.float32]
    """Coverage of one that the other lacks, pixels."""
    perimeter_M: NDArray[np.float32]
    """Length of that shape's outline, pixels."""
    sharpness_M: NDArray[np.float32]
    """Edge energy relative to that shape's, along the axis where it is less."""


def _edge_energy(windows_MHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of squared steps of coverage down the rows and along the columns (2, M).

    A step that is spread over w pixels has 1 / w of its energy.
    """
    steps = (np.diff(windows_MHW, axis=axis) for axis in (1, 2))
    return np.stack([(step * step).sum((1, 2)) for step in steps])


def _perimeter(outlines_MHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Length of outlines in pixels.

    The steps of coverage along rows and columns add up to |cos| + |sin| of the direction for each
    pixel of outline, 4 / pi on average over all directions.
    """
    steps = (np.abs(np.diff(outlines_MHW, axis=axis)).sum((1, 2)) for axis in (1, 2))
    return np.pi / 4 * sum(steps, start=np.zeros(len(outlines_MHW), np.float32))


def fit_outlines(windows_MHW: NDArray[np.float32]) -> Fit:
    """Finds the shape of each coverage by its largest overlap."""
    flat = windows_MHW.reshape(len(windows_MHW), -1)
    bank, shape_of = _outlines()
    inner_MK = flat @ bank.T
    squares_M, norms_K = (flat * flat).sum(1), (bank * bank).sum(1)
    union_MK = squares_M[:, None] + norms_K - inner_MK
    overlap_MK = inner_MK / union_MK
    best = overlap_MK.argmax(1)
    row = np.arange(len(best))
    whole_MHW = bank[best].reshape(windows_MHW.shape)
    return Fit(
        shape_M=shape_of[best],
        outline_M=overlap_MK[row, best],
        mismatch_M=union_MK[row, best] - inner_MK[row, best],
        perimeter_M=_perimeter(whole_MHW),
        sharpness_M=(_edge_energy(windows_MHW) / _edge_energy(whole_MHW)).min(0),
    )
