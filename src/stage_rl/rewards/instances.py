"""From the outputs of a Mask2Former to instances, as GenEval's detector computes them.

The library's own post-processing differs: it up-samples by nearest neighbour to a fixed size, and
drops queries by a threshold before it scores masks. What follows is MMDetection's, whose weights
and code the published GenEval figures come from (Cheng et al. 2022, arXiv 2112.01527).

Shape suffixes: Q queries, K classes (K + 1: with "no object"), I instances, H x W pixels of the
image, Y x X of the mask logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

MAX_INSTANCES = 100
"""Most probable (query, class) pairs of an image that are looked at."""
Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Instance:
    """One object in one image."""

    label: int
    """Index of its class."""
    score: float
    """Probability of the class times the mean probability inside the mask."""
    box: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels, tight around the mask, with the last pixel inside."""
    mask_HW: Tensor
    """bool, at the size of the image."""


def find_instances(
    class_logits_QK: Tensor,
    mask_logits_QYX: Tensor,
    *,
    padded: Size,
    resized: Size,
    image: Size,
    min_score: float = 0.0,
) -> list[Instance]:
    """The instances of one image with a score above `min_score`, most confident first.

    The model saw the image at `resized`, in the upper left corner of `padded`. A query may stand
    for several classes. Nothing is left out for the sake of speed: a score is at most the
    probability of its class, by which pairs are dropped first.
    """
    probability_QK = class_logits_QK.float().softmax(-1)[:, :-1]
    num_labels = probability_QK.shape[1]
    best = probability_QK.flatten().topk(min(MAX_INSTANCES, probability_QK.numel()))
    kept = best.values > min_score
    probability_I, pair_I = best.values[kept], best.indices[kept]
    queries, query_I = (pair_I // num_labels).unique(return_inverse=True)
    if not len(queries):
        return []
    logits_QHW = upsample(mask_logits_QYX[queries], padded=padded, resized=resized, image=image)
    inside_QHW = logits_QHW > 0
    # Means over the few pixels of a mask, as the published code takes them.
    sure_Q = (logits_QHW.sigmoid() * inside_QHW).flatten(1).sum(1)
    score_I = probability_I * (sure_Q / (inside_QHW.flatten(1).sum(1) + 1e-6))[query_I]
    boxes = [tight_box(mask_HW) for mask_HW in inside_QHW]
    found = [
        Instance(label, score, boxes[query], inside_QHW[query])
        for label, score, query in zip(
            (pair_I % num_labels).tolist(), score_I.tolist(), query_I.tolist(), strict=True
        )
        if score > min_score
    ]
    return sorted(found, key=lambda one: -one.score)


def upsample(logits_QYX: Tensor, *, padded: Size, resized: Size, image: Size) -> Tensor:
    """Mask logits at the size of the image: to the padded input, without its padding, and back."""
    height, width = resized
    options = {"mode": "bilinear", "align_corners": False}
    logits = interpolate(logits_QYX[None].float(), size=padded, **options)
    return interpolate(logits[..., :height, :width], size=image, **options)[0]


def tight_box(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """The box of a mask in pixels, all 0 for an empty one."""
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    edges = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).flatten().tolist()
    return (float(edges[0]), float(edges[1]), float(edges[2]), float(edges[3]))
