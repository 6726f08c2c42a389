"""The GPU's form of a decode step between its matrix products, as Triton kernels.

All of them take positions from memory, so that a step can be captured once and replayed, and
compute in fp32 whatever they read and write. With TRITON_INTERPRET=1, set before Triton is
imported, they run on a CPU.

Shape suffixes: R rows of the decode, M rows x slots, D model width, F width of the MLP, H query
heads, K key-value heads, J query heads of one key-value head, E head dimension, C width of queries,
keys and values together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stage_rl.rollout.attention import KeyValueCache
from stage_rl.rollout.backends import Attend, HeadNorms, Heads
from stage_rl.rollout.triton_attention import decode_attention


class TritonBackend:
    """The kernels behind the interface of a backend."""

    def norm(self, states_MD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """RMSNorm of the residual stream in fp32, as `dtype`."""
        return _launch_norm(states_MD, None, weight_D, eps=eps, dtype=dtype)

    def add_norm(
        self,
        states_MD: Tensor,
        delta_MD: Tensor,
        weight_D: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Adds `delta_MD` to the residual stream in place, and its norm."""
        return _launch_norm(states_MD, delta_MD, weight_D, eps=eps, dtype=dtype)

    def gated(self, gate_up_MF: Tensor) -> Tensor:
        """silu(gate) x up, in the dtype of the input."""
        num_rows, width = len(gate_up_MF), gate_up_MF.shape[1] // 2
        out = gate_up_MF.new_empty(num_rows, width)
        kernel: Any = _gated[num_rows, triton.cdiv(width, 1024)]
        kernel(gate_up_MF, out, width, SIZE=1024, enable_fp_fusion=True)
        return out

    def attention(
        self, heads: Heads, cache: KeyValueCache, positions_R: Tensor, num_live: int
    ) -> Attend:
        """The attention of one step over the live slots alone; `num_live` is not needed."""

        def attend(layer: int, qkv_RC: Tensor, norms: HeadNorms) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            query_RHE = _turn_and_store(
                qkv_RC, heads, norms, cache=(keys, values), positions_R=positions_R
            )
            query_RKJE = query_RHE.view(len(qkv_RC), heads.num_kv_heads, -1, heads.head_dim)
            return decode_attention(query_RKJE, keys, values, positions_R).flatten(1)

        return attend


def _launch_norm(
    states_MD: Tensor,
    delta_MD: Tensor | None,
    weight_D: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, width = states_MD.shape
    out = torch.empty_like(states_MD, dtype=dtype)
    kernel: Any = _add_norm[(num_rows,)]
    kernel(
        states_MD,
        states_MD if delta_MD is None else delta_MD,
        weight_D,
        out,
        eps,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        ADDS=delta_MD is not None,
        num_warps=8 if width >= 2048 else 4,
        enable_fp_fusion=True,
    )
    return out


def _turn_and_store(
    qkv_RC: Tensor,
    heads: Heads,
    norms: HeadNorms,
    *,
    cache: tuple[Tensor, Tensor],
    positions_R: Tensor,
) -> Tensor:
    """Queries turned by their positions, RHE in fp32; keys and values go to the cache."""
    num_rows, keys = len(qkv_RC), cache[0]
    query = torch.empty((num_rows, heads.num_heads, heads.head_dim), device=qkv_RC.device)
    kernel: Any = _turn[num_rows, heads.num_heads + 2 * heads.num_kv_heads]
    kernel(
        qkv_RC,
        query if norms.q_norm_E is None else norms.q_norm_E,
        query if norms.k_norm_E is None else norms.k_norm_E,
        heads.cos_S1E,
        heads.sin_S1E,
        positions_R,
        query,
        *cache,
        norms.eps,
        NUM_HEADS=heads.num_heads,
        NUM_KV_HEADS=heads.num_kv_heads,
        BLOCK=keys.shape[3],
        WIDTH=heads.head_dim,
        PADDED=triton.next_power_of_2(heads.head_dim),
        Q_NORM=norms.q_norm_E is not None,
        K_NORM=norms.k_norm_E is not None,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return query


@triton.jit
def _turn(
    qkv,
    q_norm,
    k_norm,
    cosines,
    sines,
    positions,
    query,
    keys,
    values,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
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
        cosine = tl.load(cosines + position * WIDTH + column, mask=inside, other=0.0)
        sine = tl.load(sines + position * WIDTH + column, mask=inside, other=0.0)
        turned = plain * cosine + rolled * sine
        if head < NUM_HEADS:
            tl.store(query + (row * NUM_HEADS + head) * WIDTH + column, turned, mask=inside)
        else:
            tl.store(keys + place * WIDTH + column, turned, mask=inside)


@triton.jit
def _add_norm(
    states,
    delta,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    state = tl.load(states + row * WIDTH + column, mask=inside, other=0.0)
    if ADDS:
        state += tl.load(delta + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(states + row * WIDTH + column, state, mask=inside)
    length = tl.rsqrt(tl.sum(state * state, 0) / WIDTH + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + column, state * length * scale, mask=inside)


@triton.jit
def _gated(gate_up, out, width, SIZE: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < width
    source = gate_up + row * 2 * width + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)
