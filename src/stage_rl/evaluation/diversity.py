"""How much the images of one prompt differ in code space, on objects and on background.

Shape suffixes: G images of a prompt, T image tokens, C codebook channels, N images, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize


class Diversity(NamedTuple):
    """1 - mean cosine over pairs of images, in [0, 2]; None where there is nothing to compare."""

    background: float | None
    objects: float | None


def object_cells(foreground_NHW: NDArray[np.bool_], grid: tuple[int, int]) -> Tensor:
    """The image tokens whose cell is mostly foreground, NT (bool).

    H and W are multiples of the grid.
    """
    num_images, height, width = foreground_NHW.shape
    rows, columns = grid
    assert height % rows == 0, (height, rows)
    assert width % columns == 0, (width, columns)
    cells = foreground_NHW.reshape(num_images, rows, height // rows, columns, width // columns)
    return torch.from_numpy(cells.mean((2, 4)) > 0.5).flatten(1)


def group_diversity(codes_GTC: Tensor, object_GT: Tensor) -> Diversity:
    """The diversity of a prompt's images over all pairs of them and all token positions.

    A position is one of an object where either image of the pair shows one there.
    """
    unit_GTC = normalize(codes_GTC.float(), dim=-1)
    cosine_GGT = torch.einsum("itc,jtc->ijt", unit_GTC, unit_GTC)
    object_GGT = object_GT[:, None] | object_GT[None]
    pairs_GG1 = torch.ones(cosine_GGT.shape[:2], dtype=torch.bool).triu(1)[..., None]
    background, objects = (
        _distance(cosine_GGT, pairs_GG1 & chosen) for chosen in (~object_GGT, object_GGT)
    )
    return Diversity(background, objects)


def _distance(cosine_GGT: Tensor, chosen_GGT: Tensor) -> float | None:
    if not chosen_GGT.any():
        return None
    return 1 - float(cosine_GGT[chosen_GGT].mean())
