"""What the tokenizer of a shapes model keeps of an image, and how alike its codes are.

Shape suffixes: N images, T image tokens, H x W pixels, C codebook channels, V codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stage_rl.policies.base import Policy
from stage_rl.shapes.gold import gold_detections, matches_scene
from stage_rl.shapes.layouts import random_scene
from stage_rl.shapes.pretrain_policy import tokenize
from stage_rl.shapes.scenes import Scene, render

LOOK_ALIKE = 0.8
"""Cosine from which two codes look alike."""
CHUNK = 100
"""Images that are encoded at one time."""
_KEY = 3_000_000


@dataclass(frozen=True)
class TokenizerFigures:
    """Shares, in [0, 1]."""

    gold_on_renders: float
    """Renders in which the gold judge finds exactly the objects of the scene."""
    kept: float
    """Renders in which it does so after encoding and decoding."""
    codes_used: float
    """Codes that occur in the renders."""
    lookalike_pairs: float
    """Pairs of different codes that look alike."""
    lookalike_codes: float
    """Used codes with at least one look-alike."""


def measure_tokenizer(policy: Policy, num_renders: int, *, seed: int) -> TokenizerFigures:
    """Encodes and decodes scenes that no training has seen."""
    rng = np.random.Generator(np.random.Philox(key=[seed, _KEY]))
    scenes = [random_scene(rng) for _ in range(num_renders)]
    images_NHWC = render(scenes)
    module: Any = policy.module
    parts = [images_NHWC[i : i + CHUNK] for i in range(0, num_renders, CHUNK)]
    tokens_NT = torch.cat([tokenize(module.model.vqmodel, part) for part in parts])
    rebuilt_NHWC = policy.codebook.decode(tokens_NT).numpy()
    alike_VV = _look_alikes(policy)
    used = tokens_NT.unique().cpu()
    num_codes = len(alike_VV)
    return TokenizerFigures(
        gold_on_renders=_share_right(images_NHWC, scenes),
        kept=_share_right(rebuilt_NHWC, scenes),
        codes_used=len(used) / num_codes,
        lookalike_pairs=float(alike_VV.sum()) / (num_codes * (num_codes - 1)),
        lookalike_codes=float(alike_VV[used].any(1).float().mean()),
    )


def _share_right(images_NHWC: NDArray[np.uint8], scenes: Sequence[Scene]) -> float:
    """The share of images that hold exactly the objects of their scenes."""
    found = gold_detections(images_NHWC)
    pairs = zip(found, scenes, strict=True)
    return float(np.mean([matches_scene(objects, scene.objects) for objects, scene in pairs]))


def _look_alikes(policy: Policy) -> torch.Tensor:
    """Which codes look alike, VV (bool); no code is its own look-alike."""
    codes_VC = policy.codebook.vectors(torch.arange(policy.codebook.size, device=policy.device))
    unit_VC = torch.nn.functional.normalize(codes_VC.cpu(), dim=1)
    return (unit_VC @ unit_VC.T >= LOOK_ALIKE).fill_diagonal_(False)
