"""The key-value cache and, without kernels of our own, the attention of one new token per row.

Shape suffixes: B rows of the prefill (unique prompts), R rows of the decode, K key-value heads,
J query heads of one key-value head, W blocks of slots, U slots of a block, S slots of the live
blocks, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from stage_rl.errors import InputError

BLOCK = 32
"""Slots that lie together."""


@dataclass(frozen=True)
class CacheShape:
    """What one row of the cache holds."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def row_bytes(self, num_slots: int) -> int:
        """Bytes of one row: keys and values of all layers, in whole blocks."""
        slots = math.ceil(num_slots / BLOCK) * BLOCK
        return 2 * self.num_layers * self.num_heads * self.head_dim * slots * self.dtype.itemsize


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of every layer, in blocks of slots.

    Outermost are the blocks, so that the live part is read from end to end. With all slots of a
    row together, half of them live, the gaps between rows slow the reading on a CPU. Where a slot
    lies does not depend on the number of blocks.
    """

    keys: tuple[Tensor, ...]
    """By layer, WRKUE."""
    values: tuple[Tensor, ...]

    @classmethod
    def empty(
        cls, shape: CacheShape, num_rows: int, num_slots: int, device: torch.device
    ) -> KeyValueCache:
        """Zeros: a slot that is masked still enters a product, so it must be finite."""
        num_blocks = math.ceil(num_slots / BLOCK)
        layer_shape = (2, num_blocks, num_rows, shape.num_heads, BLOCK, shape.head_dim)
        layers = [
            torch.zeros(layer_shape, dtype=shape.dtype, device=device)
            for _ in range(shape.num_layers)
        ]
        return cls(tuple(layer[0] for layer in layers), tuple(layer[1] for layer in layers))

    @property
    def num_rows(self) -> int:
        """Rows of the decode."""
        return self.keys[0].shape[1]

    @property
    def num_slots(self) -> int:
        """Slots of a row, in whole blocks."""
        return self.keys[0].shape[0] * BLOCK

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def fits(self, num_rows: int, num_slots: int) -> bool:
        """Whether these rows and slots find room."""
        return self.num_rows >= num_rows and self.num_slots >= num_slots

    def rows(self, num_rows: int) -> KeyValueCache:
        """A cache of so many rows in the memory of this one."""
        num_blocks, all_rows, *rest = self.keys[0].shape
        if num_rows == all_rows:
            return self

        def fewer(part: Tensor) -> Tensor:
            shape = (num_blocks, num_rows, *rest)
            return part.view(-1)[: math.prod(shape)].view(shape)

        return KeyValueCache(tuple(map(fewer, self.keys)), tuple(map(fewer, self.values)))

    def fill(self, layer: int, keys_BKSE: Tensor, values_BKSE: Tensor, group_size: int) -> None:
        """Writes a prefill to the first slots, each of its rows to a group of rows."""
        num_rows = len(keys_BKSE)
        for cache, new in ((self.keys, keys_BKSE), (self.values, values_BKSE)):
            pieces = new.split(BLOCK, dim=2)
            for block, piece in zip(cache[layer][: len(pieces)], pieces, strict=True):
                grouped = block.unflatten(0, (num_rows, group_size))
                grouped[:, :, :, : piece.shape[2]] = piece[:, None]

    def append(self, layer: int, keys_RKE: Tensor, values_RKE: Tensor, places: Tensor) -> None:
        """Writes one slot per row and head, at `places`."""
        head_dim = keys_RKE.shape[-1]
        for cache, new in ((self.keys, keys_RKE), (self.values, values_RKE)):
            flat, lanes = cache[layer].view(-1, head_dim), new.reshape(-1, head_dim)
            flat.index_copy_(0, places, lanes.to(flat.dtype))

    def places(self, positions_R: Tensor) -> Tensor:
        """Where slot `positions_R` of every row and head lies among all slots of a layer."""
        _, num_rows, num_heads, _, _ = self.keys[0].shape
        lanes = torch.arange(num_rows * num_heads, device=positions_R.device)
        positions = positions_R.repeat_interleave(num_heads)
        first = (positions // BLOCK) * len(lanes) + lanes
        return first * BLOCK + positions % BLOCK


def live_bias(positions_R: Tensor, num_live: int) -> Tensor:
    """0 for the slots a row has filled, -inf behind them, up to a whole block; R1S."""
    num_slots = math.ceil(num_live / BLOCK) * BLOCK
    slot_S = torch.arange(num_slots, device=positions_R.device)
    bias_RS = torch.zeros(len(positions_R), num_slots, device=positions_R.device)
    return bias_RS.masked_fill_(slot_S > positions_R[:, None], -math.inf)[:, None]


def decode_attention(
    query_RKJE: Tensor, keys_WRKUE: Tensor, values_WRKUE: Tensor, bias_R1S: Tensor
) -> Tensor:
    """Attention of one token per row over the slots of the bias, RKJE, fp32.

    On a CPU batched products and a softmax take a fraction of the time of SDPA at one query.
    """
    num_rows, num_heads, num_queries, head_dim = query_RKJE.shape
    batch = num_rows * num_heads
    query = query_RKJE.reshape(batch, num_queries, head_dim) * head_dim**-0.5
    num_blocks = bias_R1S.shape[-1] // BLOCK
    keys, values = (
        part[:num_blocks].view(num_blocks, batch, BLOCK, head_dim).to(query.dtype)
        for part in (keys_WRKUE, values_WRKUE)
    )
    scores = torch.cat([torch.bmm(query, block.transpose(1, 2)) for block in keys], -1)
    scores.view(num_rows, -1, num_blocks * BLOCK).add_(bias_R1S)
    weights = scores.softmax(-1).split(BLOCK, -1)
    mixed = torch.bmm(weights[0], values[0])
    for weight, block in zip(weights[1:], values[1:], strict=True):
        mixed.baddbmm_(weight, block)
    return mixed.view(query_RKJE.shape)


# What a decoder computes between its matrix products, in torch; `kernels` has the GPU's form.
#
# Shape suffixes: R rows of the decode, M rows x slots, D model width, F width of the MLP, H query
# heads, K key-value heads, J query heads of one key-value head, S slots, E head dimension, C
# width
# of queries, keys and values together.


BACKENDS = ("eager", "triton")

Attend = Callable[[int, Tensor, "HeadNorms"], Tensor]
"""(layer, qkv_RC, norms) -> what the heads read, side by side; writes the new keys and values."""


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each query and key before the rotation; None: there is none."""

    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    eps: float


@dataclass(frozen=True)
class Heads:
    """How queries, keys and values lie in the product of the fused projection, and turn."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos_S1E: Tensor
    sin_S1E: Tensor
    """With the sign of the half rotation, (-x2, x1)."""


class Backend(Protocol):
    """The steps between the matrix products of a decode."""

    def norm(self, states_MD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """RMSNorm of the residual stream in fp32, as `dtype`."""
        ...

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
        ...

    def gated(self, gate_up_MF: Tensor) -> Tensor:
        """silu(gate) x up, in the dtype of the input."""
        ...

    def attention(
        self, heads: Heads, cache: KeyValueCache, positions_R: Tensor, num_live: int
    ) -> Attend:
        """The attention of one step, the same for every layer.

        A row attends to its slots up to its position; `num_live` bounds the largest plus 1.
        """
        ...


class EagerBackend:
    """Torch's own operations, on any device."""

    def norm(self, states_MD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """RMSNorm of the residual stream in fp32, as `dtype`."""
        return rms_norm(states_MD, weight_D.shape, weight_D, eps).to(dtype)

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
        states_MD += delta_MD
        return self.norm(states_MD, weight_D, eps, dtype)

    def gated(self, gate_up_MF: Tensor) -> Tensor:
        """silu(gate) x up, in the dtype of the input."""
        gate, up = gate_up_MF.chunk(2, -1)
        return silu(gate) * up

    def attention(
        self, heads: Heads, cache: KeyValueCache, positions_R: Tensor, num_live: int
    ) -> Attend:
        """The attention of one step over the live blocks, with a mask."""
        cos, sin = heads.cos_S1E[positions_R], heads.sin_S1E[positions_R]
        places = cache.places(positions_R)
        bias = live_bias(positions_R, num_live)

        def attend(layer: int, qkv_RC: Tensor, norms: HeadNorms) -> Tensor:
            query, keys, values = turned(qkv_RC, heads, norms, cos=cos, sin=sin)
            cache.append(layer, keys, values, places)
            query = query.view(len(query), heads.num_kv_heads, -1, heads.head_dim)
            mixed = decode_attention(query, cache.keys[layer], cache.values[layer], bias)
            return mixed.view(len(query), -1)

        return attend


def turned(
    qkv_MC: Tensor, heads: Heads, norms: HeadNorms, *, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values in fp32, MHE or MKE, the first two turned by their positions."""
    counts = [heads.num_heads, heads.num_kv_heads]
    heads_MHE = qkv_MC.float().view(len(qkv_MC), -1, heads.head_dim)
    plain_MHE, values = heads_MHE[:, : sum(counts)], heads_MHE[:, sum(counts) :]
    if norms.q_norm_E is not None or norms.k_norm_E is not None:
        parts = zip(plain_MHE.split(counts, 1), (norms.q_norm_E, norms.k_norm_E), strict=True)
        plain_MHE = torch.cat(
            [
                part if weight is None else rms_norm(part, weight.shape, weight, norms.eps)
                for part, weight in parts
            ],
            1,
        )
    turned_MHE = plain_MHE * cos
    turned_MHE.addcmul_(plain_MHE.roll(heads.head_dim // 2, -1), sin)
    query, keys = turned_MHE.split(counts, 1)
    return query, keys, values


def pick_backend(name: str | None, device: torch.device) -> Backend:
    """The backend of a name; None: `triton` on a GPU, else `eager`. An unknown one is InputError.

    Triton's interpreter (TRITON_INTERPRET=1) runs its kernels on a CPU.
    """
    name = name or ("triton" if device.type == "cuda" else "eager")
    if name not in BACKENDS:
        raise InputError(f"backend: unknown '{name}'; write one of: {', '.join(BACKENDS)}")
    if name == "eager":
        return EagerBackend()
    if find_spec("triton") is None:
        raise InputError("the engine's kernels need triton; write: pip install 'stage-rl[triton]'")
    from stage_rl.rollout.kernels import TritonBackend

    return TritonBackend()
