"""The key-value cache, and the steps of a decode between its matmuls.

`Backend` is torch's own operations, on any device; `kernels` has the GPU's form, `numba_backend` a
CPU's.

Shape suffixes: B rows of the prefill (unique prompts), R rows of the decode, M rows x positions,
D model width, F width of the MLP, H query heads, K key-value heads, N rows x key-value heads,
J query heads of one key-value head, W blocks of positions, U positions of a block, S positions (of
a rotary table: coordinates), A rotary axes, E head dimension, C width of queries, keys and values
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from stage_rl.rollout.sampling import Drawn, Sampling, draw_tokens

BLOCK = 32
"""Positions that lie together."""

LAYOUTS = {
    "blocks": ("WRKUE", "WRKUE"),
    "rows": ("RKWUE", "RKWUE"),
    "transposed": ("RKWEU", "RKWUE"),
}
"""The axes of keys and of values in memory, the outermost first."""

FP8 = torch.float8_e4m3fn
"""Of a cache in 8 bits: each key and value, a head's share of a position, has a scale in fp32."""

LARGEST_FP8, SMALLEST_SCALE = 448.0, 1e-12


@dataclass(frozen=True)
class CacheShape:
    """What one row of the cache holds."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def row_bytes(self, num_positions: int) -> int:
        """Bytes of one row: keys and values of all layers, in whole blocks."""
        length = math.ceil(num_positions / BLOCK) * BLOCK
        each = self.head_dim * self.dtype.itemsize + (4 if self.dtype == FP8 else 0)
        return 2 * self.num_layers * self.num_heads * each * length


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of every layer, in blocks of positions.

    A GPU has the blocks outermost: what is live is then read from end to end, and where a position
    lies does not depend on their number. A CPU has the rows outermost: torch's own attention wants
    the positions of a row side by side, and for it there is one block.
    """

    keys: tuple[Tensor, ...]
    """By layer, WRKUE."""
    values: tuple[Tensor, ...]
    key_scales: tuple[Tensor, ...] = ()
    """By layer, WRKU, of a cache in fp8: what its numbers are multiplied with."""
    value_scales: tuple[Tensor, ...] = ()

    @classmethod
    def empty(
        cls,
        shape: CacheShape,
        num_rows: int,
        num_positions: int,
        device: torch.device,
        *,
        layout: str = "blocks",
    ) -> KeyValueCache:
        """Zeros, in one of `LAYOUTS`: a position that is masked still enters a matmul, so it must
        be finite.
        """
        num_blocks = math.ceil(num_positions / BLOCK)
        blocks = (1, num_blocks * BLOCK) if layout == "rows" else (num_blocks, BLOCK)
        layer_shape = (blocks[0], num_rows, shape.num_heads, blocks[1], shape.head_dim)

        def layers(part: int) -> tuple[Tensor, ...]:
            order = ["WRKUE".index(axis) for axis in LAYOUTS[layout][part]]
            sizes = [layer_shape[axis] for axis in order]
            back = [order.index(axis) for axis in range(5)]
            return tuple(
                torch.zeros(sizes, dtype=shape.dtype, device=device).permute(back)
                for _ in range(shape.num_layers)
            )

        scaled = range(shape.num_layers if shape.dtype == FP8 else 0)
        scales = (tuple(torch.zeros(layer_shape[:-1], device=device) for _ in scaled) for _ in "kv")
        return cls(layers(0), layers(1), *scales)

    @property
    def parts(self) -> tuple[tuple[Tensor, ...], ...]:
        """All tensors by their use, and by layer."""
        return self.keys, self.values, self.key_scales, self.value_scales

    @property
    def num_rows(self) -> int:
        return self.keys[0].shape[1]

    @property
    def num_positions(self) -> int:
        """Positions of a row, in whole blocks."""
        return self.keys[0].shape[0] * self.keys[0].shape[3]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part)

    def fits(self, num_rows: int, num_positions: int) -> bool:
        """Whether these rows and positions find room."""
        return self.num_rows >= num_rows and self.num_positions >= num_positions

    def rows(self, num_rows: int) -> KeyValueCache:
        """A cache of so many rows in the memory of this one."""
        if num_rows == self.num_rows:
            return self

        def fewer(part: Tensor) -> Tensor:
            if part.stride(0) <= part.stride(1):  # the rows are outermost
                return part[:, :num_rows]
            shape = (part.shape[0], num_rows, *part.shape[2:])
            return part.view(-1)[: math.prod(shape)].view(shape)

        return KeyValueCache(*(tuple(map(fewer, part)) for part in self.parts))

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, of a cache in fp8 as fp32, WRKUE."""
        if not self.key_scales:
            return self.keys[layer], self.values[layer]
        return (
            self.keys[layer].float() * self.key_scales[layer][..., None],
            self.values[layer].float() * self.value_scales[layer][..., None],
        )

    def _stored(self, layer: int, keys_E: Tensor, values_E: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The tensors of a layer, and what they take of new keys and values, whose last axis is E
        (1 for scales).
        """
        news = [keys_E, values_E]
        if not self.key_scales:
            return [(part[layer], new) for part, new in zip(self.parts[:2], news, strict=False)]
        quantized = [quantize(new) for new in news]
        # Few operations know fp8: its bytes are copied.
        pairs = [
            (part[layer].view(torch.uint8), numbers.view(torch.uint8))
            for part, (numbers, _) in zip(self.parts[:2], quantized, strict=True)
        ]
        scales = zip(self.parts[2:], quantized, strict=True)
        return pairs + [(part[layer][..., None], scale) for part, (_, scale) in scales]

    def fill(self, layer: int, keys_BKSE: Tensor, values_BKSE: Tensor, group_size: int) -> None:
        """Writes a prefill to the first positions, each of its rows to a group of rows."""
        num_rows, block_size = len(keys_BKSE), self.keys[0].shape[3]
        for cache, new in self._stored(layer, keys_BKSE, values_BKSE):
            pieces = new.split(block_size, dim=2)
            for block, piece in zip(cache[: len(pieces)], pieces, strict=True):
                grouped = block.unflatten(0, (num_rows, group_size))
                grouped[:, :, :, : piece.shape[2]] = piece[:, None]

    def append(self, layer: int, keys_RKE: Tensor, values_RKE: Tensor, index: Tensor) -> None:
        """Writes one position per row and head, at `flat_index`."""
        for cache, new in self._stored(layer, keys_RKE, values_RKE):
            flat, lanes = cache.view(-1, cache.shape[-1]), new.reshape(-1, new.shape[-1])
            flat.index_copy_(0, index, lanes.to(flat.dtype))

    def flat_index(self, positions_R: Tensor) -> Tensor:
        """Where `positions_R` of every row and head lie among all positions of a layer."""
        _, num_rows, num_heads, block_size, _ = self.keys[0].shape
        lanes = torch.arange(num_rows * num_heads, device=positions_R.device)
        positions = positions_R.repeat_interleave(num_heads)
        first = (positions // block_size) * len(lanes) + lanes
        return first * block_size + positions % block_size


@dataclass(frozen=True)
class Heads:
    """How queries, keys and values lie in what the fused projection gives, and rotate."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    """Of the norms of queries and keys, where a family has them."""
    cos_SE: Tensor
    sin_SE: Tensor
    """By coordinate; with the sign of the half rotation, (-x2, x1)."""
    axis_E: Tensor | None = None
    """Axis whose coordinate a rotary dimension takes; None: there is one axis."""

    def rotation(self, coords_MA: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at coordinates, M1E."""
        if self.axis_E is None:
            index_M = coords_MA[:, 0]
            return self.cos_SE[index_M, None], self.sin_SE[index_M, None]
        index_ME = coords_MA[:, self.axis_E]
        return self.cos_SE.gather(0, index_ME)[:, None], self.sin_SE.gather(0, index_ME)[:, None]


@dataclass(frozen=True)
class HeadNorms:
    """Weights of the RMSNorm of each query and key before the rotation; None: there is none."""

    q_norm_E: Tensor | None
    k_norm_E: Tensor | None


class SharedPrompts(NamedTuple):
    """Where the keys and values of each row's prompt may be read: every row of a group has them."""

    lengths_R: Tensor
    rows_R: Tensor
    """The first row of the group."""


Attend = Callable[[int, Tensor, HeadNorms], Tensor]
"""(layer, qkv_RC, norms) -> what the heads read, side by side; writes the new keys and values."""


class Backend:
    """The steps between the matmuls of a decode, by torch's own operations."""

    layout = "rows"
    """Of the cache that it reads."""

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
        """RMSNorm of the residual stream in fp32, as `dtype`.

        `delta_MD`, through a norm of its own where one is given, is first added to it in place.
        """
        if delta_MD is not None:
            if delta_norm_D is not None:
                delta_MD = rms_norm(delta_MD.float(), delta_norm_D.shape, delta_norm_D, eps)
            states_MD += delta_MD
        return rms_norm(states_MD, weight_D.shape, weight_D, eps).to(dtype)

    def swiglu(self, gate_up_MF: Tensor) -> Tensor:
        """silu(gate) x up, in the dtype of the input."""
        gate, up = gate_up_MF.chunk(2, -1)
        return silu(gate) * up

    def draw(self, logits_RV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Drawn:
        """A token of every image from the logits of a column."""
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
        """The attention of one step, the same for every layer.

        A row attends up to its own position and rotates by its coordinates; `num_live`
        bounds the largest position plus 1, where the backend needs a bound. `prompts` are read in
        their own row here.
        """
        cos, sin = heads.rotation(coords_RA)
        index, mask = cache.flat_index(positions_R), length_mask(positions_R, num_live)
        # A CPU multiplies in the dtype of the cache; elsewhere this is the form to compare with.
        known = mask.device.type == "cpu" and not cache.key_scales
        kind = cache.keys[0].dtype if known else torch.float32
        mask = mask.to(kind)

        def attend(layer: int, qkv_RC: Tensor, norms: HeadNorms) -> Tensor:
            query, keys, values = apply_rotary(qkv_RC, heads, norms, cos=cos, sin=sin)
            cache.append(layer, keys, values, index)
            query = query.to(kind).view(len(query), heads.num_kv_heads, -1, heads.head_dim)
            mixed = decode_attention(query, *cache.read(layer), mask)
            return mixed.view(len(query), -1)

        return attend


def quantize(values_E: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors in fp8 and their scales in fp32, whose last axis is 1: the largest becomes 448."""
    largest = values_E.float().abs().amax(-1, keepdim=True)
    scale = (largest / LARGEST_FP8).clamp_min(SMALLEST_SCALE)
    return (values_E.float() / scale).to(FP8), scale


def apply_rotary(
    qkv_MC: Tensor, heads: Heads, norms: HeadNorms, *, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and values in fp32, MHE or MKE, the first two normed and rotated."""
    counts = [heads.num_heads, heads.num_kv_heads]
    heads_MHE = qkv_MC.float().view(len(qkv_MC), -1, heads.head_dim)
    plain_MHE, values = heads_MHE[:, : sum(counts)], heads_MHE[:, sum(counts) :]
    if norms.q_norm_E is not None or norms.k_norm_E is not None:
        parts = zip(plain_MHE.split(counts, 1), (norms.q_norm_E, norms.k_norm_E), strict=True)
        plain_MHE = torch.cat(
            [
                part if weight is None else rms_norm(part, weight.shape, weight, heads.norm_eps)
                for part, weight in parts
            ],
            1,
        )
    rotated_MHE = plain_MHE * cos
    rotated_MHE.addcmul_(plain_MHE.roll(heads.head_dim // 2, -1), sin)
    query, keys = rotated_MHE.split(counts, 1)
    return query, keys, values


def length_mask(positions_R: Tensor, num_live: int) -> Tensor:
    """0 for the positions a row has filled, -inf behind them, R1S."""
    position_S = torch.arange(num_live, device=positions_R.device)
    mask_RS = torch.zeros(len(positions_R), num_live, device=positions_R.device)
    return mask_RS.masked_fill_(position_S > positions_R[:, None], -math.inf)[:, None]


def decode_attention(
    query_RKJE: Tensor, keys_WRKUE: Tensor, values_WRKUE: Tensor, mask_R1S: Tensor
) -> Tensor:
    """Attention of one token per row over the positions of the mask, RKJE in the query's dtype."""
    keys_RKSE, values_RKSE = (
        _side_by_side(part, mask_R1S.shape[-1]).to(query_RKJE.dtype)
        for part in (keys_WRKUE, values_WRKUE)
    )
    # The query heads of a key-value head take the place of positions.
    return scaled_dot_product_attention(
        query_RKJE, keys_RKSE, values_RKSE, attn_mask=mask_R1S[:, None]
    )


def _side_by_side(part_WRKUE: Tensor, num_live: int) -> Tensor:
    """The live positions of a cache, RKSE: one block where it lies, several copied."""
    return part_WRKUE.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :num_live]
