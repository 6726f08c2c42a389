"""A column's tokens from its logits in one Triton kernel: guidance, softmax, draw and statistics.

Shape suffixes: R rows (N conditional, then with guidance N unconditional), N images, V codebook
size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stage_rl.rollout.sampling import Drawn, Sampling

LARGEST_TILE = 2048
"""Entries of the codebook that a program holds at one time."""


def draw_tokens(logits_RV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Drawn:
    """`sampling.draw_tokens` of a sampling that is `whole`, one program per image.

    The tokens are those of torch but where a uniform number lies within rounding of a cumulative
    probability. A token of probability 0 is never drawn.
    """
    num_images, width = len(uniforms_N), logits_RV.shape[1]
    tokens_N = torch.empty(num_images, dtype=torch.long, device=logits_RV.device)
    logprobs, guided_logprobs, entropy, guided_entropy = torch.empty(
        (4, num_images), device=logits_RV.device
    )
    kernel: Any = _draw[(num_images,)]
    kernel(
        logits_RV,
        uniforms_N,
        tokens_N,
        logprobs,
        guided_logprobs,
        entropy,
        guided_entropy,
        sampling.guidance_scale,
        sampling.temperature,
        WIDTH=width,
        TILE=min(triton.next_power_of_2(width), LARGEST_TILE),
        GUIDED=sampling.guided,
        GUIDED_ENTROPY=sampling.guided_entropy,
        num_warps=8,
        enable_fp_fusion=True,
    )
    asked = guided_entropy if sampling.guided_entropy else None
    return Drawn(tokens_N, logprobs, guided_logprobs, entropy, asked)


@triton.jit
def _logits(cond, uncond, column, scale, WIDTH: tl.constexpr, GUIDED: tl.constexpr):
    """Conditional and guided logits of some columns, -inf beyond the last."""
    inside = column < WIDTH
    plain = tl.load(cond + column, mask=inside, other=0.0)
    guided = plain
    if GUIDED:
        free = tl.load(uncond + column, mask=inside, other=0.0)
        guided = free + scale * (plain - free)
    beyond = -float("inf")
    return tl.where(inside, plain, beyond), tl.where(inside, guided, beyond)


@triton.jit
def _entropy(weights, inners):
    """Of the distribution of weights w = exp(l), summed by tiles, and of w x l."""
    total = tl.sum(weights, 0)
    return tl.log(total) - tl.sum(inners / total, 0)


@triton.jit
def _draw(
    logits,
    uniforms,
    tokens,
    logprobs,
    guided_logprobs,
    entropies,
    guided_entropies,
    scale,
    temperature,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    GUIDED: tl.constexpr,
    GUIDED_ENTROPY: tl.constexpr,
):
    image = tl.program_id(0)
    cond = logits + image.to(tl.int64) * WIDTH
    uncond = cond + tl.num_programs(0).to(tl.int64) * WIDTH
    offset = tl.arange(0, TILE)

    highest = tl.full([TILE], -float("inf"), tl.float32)
    guided_highest = highest
    for first in range(0, WIDTH, TILE):
        plain, guided = _logits(cond, uncond, first + offset, scale, WIDTH, GUIDED)
        highest = tl.maximum(highest, plain)
        guided_highest = tl.maximum(guided_highest, guided)
    top, guided_top = tl.max(highest, 0), tl.max(guided_highest, 0)

    totals = tl.zeros([TILE], tl.float32)
    inners, guided_totals, guided_inners, drawn_totals = totals, totals, totals, totals
    for first in range(0, WIDTH, TILE):
        inside = first + offset < WIDTH
        plain, guided = _logits(cond, uncond, first + offset, scale, WIDTH, GUIDED)
        weight = tl.exp(plain - top)
        totals += weight
        inners += weight * tl.where(inside, plain - top, 0.0)
        if GUIDED_ENTROPY:
            weight = tl.exp(guided - guided_top)
            guided_totals += weight
            guided_inners += weight * tl.where(inside, guided - guided_top, 0.0)
        drawn_totals += tl.exp((guided - guided_top) / temperature)
    total, drawn_total = tl.sum(totals, 0), tl.sum(drawn_totals, 0)

    # The first token whose cumulative weight exceeds the threshold; where rounding leaves none, the
    # last one with a weight.
    threshold = tl.load(uniforms + image) * drawn_total
    below, found, last = tl.zeros([1], tl.float32), WIDTH, 0
    for first in range(0, WIDTH, TILE):
        column = first + offset
        _, guided = _logits(cond, uncond, column, scale, WIDTH, GUIDED)
        weight = tl.exp((guided - guided_top) / temperature)
        reached = below + tl.cumsum(weight, 0) > threshold
        found = tl.minimum(found, tl.min(tl.where(reached & (weight > 0), column, WIDTH), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, column, 0), 0))
        below += tl.sum(weight, 0)
    token = tl.where(found < WIDTH, found, last)

    plain, guided = _logits(cond, uncond, token, scale, WIDTH, GUIDED)
    tl.store(tokens + image, token)
    tl.store(logprobs + image, plain - top - tl.log(total))
    drawn = (guided - guided_top) / temperature - tl.log(drawn_total)
    tl.store(guided_logprobs + image, drawn)
    tl.store(entropies + image, _entropy(totals, inners))
    if GUIDED_ENTROPY:
        tl.store(guided_entropies + image, _entropy(guided_totals, guided_inners))
