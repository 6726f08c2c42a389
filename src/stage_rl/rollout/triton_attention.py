"""Attention of one new token per row as a Triton kernel that reads the live slots alone.

Positions come from memory, so that a step can be captured once and replayed; the softmax is online
and in fp32 whatever the cache holds.

Shape suffixes: R rows of the decode, H rows x query heads, K key-value heads, J query heads of one
key-value head, W blocks of slots, U slots of a block, E head dimension, Z parts of the sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64
"""Slots that a program holds at one time."""
PROGRAMS = 1024
"""Programs that keep a GPU busy: with fewer rows x heads, the sequence is split."""
LARGEST_SPLIT = 16


def decode_attention(
    query_RKJE: Tensor,
    keys_WRKUE: Tensor,
    values_WRKUE: Tensor,
    positions_R: Tensor,
    *,
    num_parts: int | None = None,
) -> Tensor:
    """Attention of one token per row over its slots up to its position, RKJE, fp32.

    One program per row and query head reads the live slots with an online softmax; where those are
    few, `num_parts` programs share a sequence (None: as many as keep a GPU busy).
    """
    num_rows, num_kv_heads, num_queries, head_dim = query_RKJE.shape
    num_heads = num_rows * num_kv_heads * num_queries
    num_parts = num_parts or parts_of(num_heads)
    out_ZHE = torch.empty((num_parts, num_heads, head_dim), device=query_RKJE.device)
    sum_ZH = torch.empty((num_parts, num_heads), device=query_RKJE.device)
    # Options of the compiler are no parameters of the function.
    kernel: Any = _attend[num_heads, num_parts]
    kernel(
        query_RKJE,
        keys_WRKUE,
        values_WRKUE,
        positions_R,
        out_ZHE,
        sum_ZH,
        head_dim**-0.5 * math.log2(math.e),
        num_kv_heads * num_queries,
        num_rows * num_kv_heads,
        QUERIES=num_queries,
        BLOCK=keys_WRKUE.shape[3],
        TILE=TILE,
        WIDTH=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        PARTS=num_parts,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    return _joined(out_ZHE, sum_ZH).view(query_RKJE.shape)


def _joined(out_ZHE: Tensor, sum_ZH: Tensor) -> Tensor:
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
    out,
    sums,
    scale,
    heads_of_row,
    num_lanes,
    QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    head, part = tl.program_id(0), tl.program_id(1)
    length = tl.load(positions + head // heads_of_row).to(tl.int32) + 1
    # Whole tiles for each part; the last parts of a short sequence may have none.
    slots_of_part = tl.cdiv(tl.cdiv(length, TILE), PARTS) * TILE
    first = part * slots_of_part
    last = tl.minimum(length, first + slots_of_part)
    lane = head // QUERIES
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    vector = tl.load(query + head * WIDTH + column, mask=inside, other=0.0) * scale
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([PADDED], tl.float32)
    for start in range(first, last, TILE):
        slot = start + tl.arange(0, TILE)
        live = slot < last
        place = ((slot // BLOCK).to(tl.int64) * num_lanes + lane) * BLOCK + slot % BLOCK
        address = place[:, None] * WIDTH + column[None, :]
        wanted = live[:, None] & inside[None, :]
        key = tl.load(keys + address, mask=wanted, other=0.0).to(tl.float32)
        value = tl.load(values + address, mask=wanted, other=0.0).to(tl.float32)
        score = tl.where(live, tl.sum(key * vector[None, :], 1), -float("inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        weight = tl.exp2(score - new_top)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = new_top
    # Of a part without slots the sum is 2^-inf, its share 0.
    divisor = tl.where(total > 0, total, 1.0)
    place_of_part = part * tl.num_programs(0) + head
    tl.store(out + place_of_part * WIDTH + column, mixed / divisor, mask=inside)
    tl.store(sums + place_of_part, top + tl.log2(divisor))
