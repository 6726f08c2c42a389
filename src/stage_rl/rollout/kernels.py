"""The GPU's form of a decode step between its matmuls, as Triton kernels.

All of them take positions from memory, so that a step can be captured once and replayed, and
compute in fp32 whatever they read and write; attention reads the live positions alone. With
TRITON_INTERPRET=1, set before Triton is imported, they run on a CPU.

Shape suffixes: R rows of the decode, M rows x positions, D model width, F width of the MLP, H query
heads (in the attention: rows x query heads), K key-value heads, J query heads of one key-value
head, A rotary axes, W blocks of positions, U positions of a block, E head dimension, Z parts of the
sequence, C width of queries, keys and values together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stage_rl.rollout.attention import (
    LARGEST_FP8,
    SMALLEST_SCALE,
    Attend,
    Backend,
    HeadNorms,
    Heads,
    KeyValueCache,
    SharedPrompts,
)
from stage_rl.rollout.draw_kernel import draw_tokens
from stage_rl.rollout.sampling import Drawn, Sampling


class TritonBackend(Backend):
    """The same steps as kernels, which read the live positions alone and need no `num_live`."""

    layout = "blocks"

    def norm(
        self,
        states_MD: Tensor,
        weight_D: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
        delta_MD: Tensor | None = None,
        delta_norm_D: Tensor | None = None,
    ) -> Tensor:
        num_rows, width = states_MD.shape
        out = torch.empty_like(states_MD, dtype=dtype)
        # Options of the compiler are no parameters of the function.
        kernel: Any = _norm[(num_rows,)]
        kernel(
            states_MD,
            states_MD if delta_MD is None else delta_MD,
            weight_D if delta_norm_D is None else delta_norm_D,
            weight_D,
            out,
            eps,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            ADDS=delta_MD is not None,
            DELTA_NORM=delta_norm_D is not None,
            num_warps=8 if width >= 2048 else 4,
            enable_fp_fusion=True,
        )
        return out

    def swiglu(self, gate_up_MF: Tensor) -> Tensor:
        num_rows, width = len(gate_up_MF), gate_up_MF.shape[1] // 2
        out = gate_up_MF.new_empty(num_rows, width)
        kernel: Any = _swiglu[num_rows, triton.cdiv(width, 1024)]
        kernel(gate_up_MF, out, width, SIZE=1024, enable_fp_fusion=True)
        return out

    def draw(self, logits_RV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Drawn:
        # To leave tokens out, or to take the likeliest, is not in the kernel.
        if not sampling.whole:
            return super().draw(logits_RV, uniforms_N, sampling)
        return draw_tokens(logits_RV, uniforms_N, sampling)

    def attention(
        self,
        heads: Heads,
        cache: KeyValueCache,
        positions_R: Tensor,
        coords_RA: Tensor,
        prompts: SharedPrompts,
        num_live: int,
    ) -> Attend:
        def attend(layer: int, qkv_RC: Tensor, norms: HeadNorms) -> Tensor:
            held = [part[layer] for part in cache.parts if part]
            query_RHE = _rotate_and_store(
                qkv_RC, heads, norms, held, positions_R=positions_R, coords_RA=coords_RA
            )
            query_RKJE = query_RHE.view(len(qkv_RC), heads.num_kv_heads, -1, heads.head_dim)
            keys, values, *scales = held
            mixed_RKJE = decode_attention(
                query_RKJE, keys, values, positions_R, prompts, scales=scales
            )
            return mixed_RKJE.flatten(1)

        return attend


def _rotate_and_store(
    qkv_RC: Tensor,
    heads: Heads,
    norms: HeadNorms,
    cache: Sequence[Tensor],
    *,
    positions_R: Tensor,
    coords_RA: Tensor,
) -> Tensor:
    """Rotated queries, RHE in fp32; keys and values go to the cache, in fp8 with their scales."""
    num_rows, (keys, values, *scales) = len(qkv_RC), cache
    query = torch.empty((num_rows, heads.num_heads, heads.head_dim), device=qkv_RC.device)
    kernel: Any = _rotate[num_rows, heads.num_heads + 2 * heads.num_kv_heads]
    kernel(
        qkv_RC,
        query if norms.q_norm_E is None else norms.q_norm_E,
        query if norms.k_norm_E is None else norms.k_norm_E,
        heads.cos_SE,
        heads.sin_SE,
        positions_R,
        coords_RA,
        coords_RA if heads.axis_E is None else heads.axis_E,
        query,
        keys,
        values,
        *(scales or (query, query)),
        heads.norm_eps,
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        AXES=1 if heads.axis_E is None else coords_RA.shape[1],
        BLOCK=keys.shape[3],
        WIDTH=heads.head_dim,
        PADDED=triton.next_power_of_2(heads.head_dim),
        Q_NORM=norms.q_norm_E is not None,
        K_NORM=norms.k_norm_E is not None,
        LARGEST=LARGEST_FP8 if scales else 0.0,
        SMALLEST=SMALLEST_SCALE,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return query


@triton.jit
def _rotate(
    qkv,
    q_norm,
    k_norm,
    cosines,
    sines,
    positions,
    coords,
    axes,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    other_half = (column + WIDTH // 2) % WIDTH
    source = qkv + (row * (NUM_HEADS + 2 * NUM_KV_HEADS) + head) * WIDTH
    plain = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    lane = row * NUM_KV_HEADS + (head - NUM_HEADS) % NUM_KV_HEADS
    lanes = tl.num_programs(0) * NUM_KV_HEADS
    place = ((position // BLOCK) * lanes + lane) * BLOCK + position % BLOCK
    if head >= NUM_HEADS + NUM_KV_HEADS:
        if LARGEST > 0:
            scale = tl.maximum(tl.max(tl.abs(plain), 0) / LARGEST, SMALLEST)
            tl.store(value_scales + place, scale)
            plain /= scale
        tl.store(values + place * WIDTH + column, plain, mask=inside)
    else:
        rolled = tl.load(source + other_half, mask=inside, other=0.0).to(tl.float32)
        length = tl.rsqrt(tl.sum(plain * plain, 0) / WIDTH + eps)
        if Q_NORM and head < NUM_HEADS:
            plain *= length * tl.load(q_norm + column, mask=inside, other=0.0)
            rolled *= length * tl.load(q_norm + other_half, mask=inside, other=0.0)
        if K_NORM and head >= NUM_HEADS:
            plain *= length * tl.load(k_norm + column, mask=inside, other=0.0)
            rolled *= length * tl.load(k_norm + other_half, mask=inside, other=0.0)
        if AXES == 1:
            coord = tl.load(coords + row)
        else:
            axis = tl.load(axes + column, mask=inside, other=0)
            coord = tl.load(coords + row * AXES + axis, mask=inside, other=0)
        cosine = tl.load(cosines + coord * WIDTH + column, mask=inside, other=0.0)
        sine = tl.load(sines + coord * WIDTH + column, mask=inside, other=0.0)
        rotated = plain * cosine + rolled * sine
        if head < NUM_HEADS:
            tl.store(query + (row * NUM_HEADS + head) * WIDTH + column, rotated, mask=inside)
        else:
            if LARGEST > 0:
                scale = tl.maximum(tl.max(tl.abs(rotated), 0) / LARGEST, SMALLEST)
                tl.store(key_scales + place, scale)
                rotated /= scale
            tl.store(keys + place * WIDTH + column, rotated, mask=inside)


@triton.jit
def _norm(
    states,
    delta,
    delta_norm,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
    DELTA_NORM: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    state = tl.load(states + row * WIDTH + column, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(delta + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        if DELTA_NORM:
            added *= tl.rsqrt(tl.sum(added * added, 0) / WIDTH + eps)
            added *= tl.load(delta_norm + column, mask=inside, other=0.0)
        state += added
        tl.store(states + row * WIDTH + column, state, mask=inside)
    length = tl.rsqrt(tl.sum(state * state, 0) / WIDTH + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, state * length * scale, mask=inside)


@triton.jit
def _swiglu(gate_up, out, width, SIZE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    source = gate_up + row * 2 * width + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


class AttentionForm(NamedTuple):
    """How a program goes through the positions of its sequence."""

    tile: int
    """Positions that it holds at one time."""
    stages: int
    """Tiles that are on their way from memory at one time."""
    masked: bool
    """Whether dead positions of the last tile are left out; else a tile is whole blocks."""
    shared: bool = False
    """Whether the rows of a group read one copy of their prompt, which then stays in the L2
    cache."""


FORMS = {
    "masked": AttentionForm(64, 2, True),
    "blocks": AttentionForm(32, 3, False),
    "shared": AttentionForm(64, 2, True, shared=True),
}
"""Registers against loads under way, and fewer bytes against longer addresses; `stage bench
decode-attention` times them all."""
FORM = "masked"

PROGRAMS = 1024
"""Programs that keep a GPU busy: with fewer rows x heads, the sequence is split."""

LARGEST_SPLIT = 16


def decode_attention(
    query_RKJE: Tensor,
    keys_WRKUE: Tensor,
    values_WRKUE: Tensor,
    positions_R: Tensor,
    prompts: SharedPrompts,
    *,
    num_parts: int | None = None,
    form: str | None = None,
    scales: Sequence[Tensor] = (),
) -> Tensor:
    """Attention of one token per row up to its own position, RKJE, fp32.

    One program per row and query head reads the live positions with an online softmax; where those
    are few, `num_parts` programs share a sequence (None: as many as keep a GPU busy). `scales`,
    WRKU, are those of keys and values in fp8. Every form gives the same numbers.
    """
    num_rows, num_kv_heads, num_queries, head_dim = query_RKJE.shape
    num_heads = num_rows * num_kv_heads * num_queries
    num_parts, chosen = num_parts or parts_of(num_heads), FORMS[form or FORM]
    out_ZHE = torch.empty((num_parts, num_heads, head_dim), device=query_RKJE.device)
    sum_ZH = torch.empty((num_parts, num_heads), device=query_RKJE.device)
    kernel: Any = _attend[num_heads, num_parts]
    kernel(
        query_RKJE,
        keys_WRKUE,
        values_WRKUE,
        positions_R,
        *prompts,
        *(scales or (out_ZHE, out_ZHE)),
        out_ZHE,
        sum_ZH,
        head_dim**-0.5 * math.log2(math.e),
        num_kv_heads * num_queries,
        num_rows * num_kv_heads,
        QUERIES=num_queries,
        BLOCK=keys_WRKUE.shape[3],
        TILE=chosen.tile,
        STAGES=chosen.stages,
        MASKED=chosen.masked,
        SHARED=chosen.shared,
        WIDTH=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        PARTS=num_parts,
        SCALED=len(scales) > 0,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return _combined(out_ZHE, sum_ZH).view(query_RKJE.shape)


def _combined(out_ZHE: Tensor, sum_ZH: Tensor) -> Tensor:
    """What the parts of each sequence read, by the logarithm to base 2 of their shares; HE."""
    if len(out_ZHE) == 1:
        return out_ZHE[0]
    share_ZH = sum_ZH.mul_(math.log(2)).softmax(0)
    return (share_ZH[..., None] * out_ZHE).sum(0)


def parts_of(num_heads: int) -> int:
    """Parts of the sequence for a number of rows x heads: a power of two."""
    wanted = max(1, PROGRAMS // num_heads)
    return min(LARGEST_SPLIT, 1 << (wanted.bit_length() - 1))


@triton.jit
def _attend(
    query,
    keys,
    values,
    positions,
    prompt_lengths,
    prompt_rows,
    key_scales,
    value_scales,
    out,
    sums,
    scale,
    heads_of_row,
    num_lanes,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
):
    head, part = tl.program_id(0), tl.program_id(1)
    row = head // heads_of_row
    length = tl.load(positions + row).to(tl.int32) + 1
    # Whole tiles for each part; the last parts of a short sequence may have none.
    positions_of_part = tl.cdiv(tl.cdiv(length, TILE), PARTS) * TILE
    first = part * positions_of_part
    last = tl.minimum(length, first + positions_of_part)
    lane = head // QUERIES
    prompt_length = tl.load(prompt_lengths + row).to(tl.int32) if SHARED else 0
    rows_before = row - tl.load(prompt_rows + row).to(tl.int32) if SHARED else 0
    prompt_lane = lane - rows_before * (heads_of_row // QUERIES)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    vector = tl.load(query + head * WIDTH + column, mask=inside, other=0.0) * scale
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([PADDED], tl.float32)
    # Without a product of matrices in it, a plain loop would not load ahead.
    for start in tl.range(first, last, TILE, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        position = start + tl.arange(0, TILE)
        live = position < last
        read = tl.where(position < prompt_length, prompt_lane, lane) if SHARED else lane
        place = ((position // BLOCK).to(tl.int64) * num_lanes + read) * BLOCK + position % BLOCK
        address = place[:, None] * WIDTH + column[None, :]
        if MASKED:
            wanted = live[:, None] & inside[None, :]
            key = tl.load(keys + address, mask=wanted, other=0.0).to(tl.float32)
            value = tl.load(values + address, mask=wanted, other=0.0).to(tl.float32)
        elif WIDTH == PADDED:
            key = tl.load(keys + address).to(tl.float32)
            value = tl.load(values + address).to(tl.float32)
        else:
            key = tl.load(keys + address, mask=inside[None, :], other=0.0).to(tl.float32)
            value = tl.load(values + address, mask=inside[None, :], other=0.0).to(tl.float32)
        score = tl.sum(key * vector[None, :], 1)
        if SCALED:
            score *= tl.load(key_scales + place, mask=live, other=0.0)
        score = tl.where(live, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        if SCALED:
            weight *= tl.load(value_scales + place, mask=live, other=0.0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = new_top
    # Of a part without positions the sum is 2^-inf, its share 0.
    divisor = tl.where(total > 0, total, 1.0)
    place_of_part = part * tl.num_programs(0) + head
    tl.store(out + place_of_part * WIDTH + column, mixed / divisor, mask=inside)
    tl.store(sums + place_of_part, top + tl.log2(divisor))
