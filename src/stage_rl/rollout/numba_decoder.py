"""A decoder on a CPU whose layers are one kernel each, with their matmuls, and its head.

Between two operations of torch its threads wait for the slowest, and Python runs. The rows of a
decode need nothing of each other: here a thread takes its rows through a whole layer by itself.

Shape suffixes: R rows, D model width, A rotary axes, C width of queries, keys and values together,
N columns and K rows of a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu

from stage_rl.policies.base import DecoderWeights
from stage_rl.rollout import numba_kernels as kernels
from stage_rl.rollout.attention import KeyValueCache, SharedPrompts
from stage_rl.rollout.decoder import Decoder, FusedLayer
from stage_rl.rollout.numba_backend import NumbaBackend, as_array, norm_arrays, use_threads

MOST_BYTES = 64 * 2**20
"""Every thread reads all weights, which is no loss while a processor's cache holds them."""


class PackedLayer(NamedTuple):
    """A layer as `numba_kernels.run_layer` takes it."""

    attention_norm_D: np.ndarray
    wqkv: np.ndarray
    bias_C: np.ndarray
    wo: np.ndarray
    mlp_norm_D: np.ndarray
    w_gate_up: np.ndarray
    w_down: np.ndarray
    no_bias: np.ndarray


class PackedDecoder(Decoder):
    """Same numbers as `Decoder`, to rounding; what it does not know is run as there.

    That is all but linear layers in bf16 on a processor with AVX512-BF16, of widths that whole
    tiles cover, without norms behind attention and MLP, and few enough.
    """

    backend: NumbaBackend

    @torch.no_grad()
    def load(self, weights: DecoderWeights) -> None:
        super().load(weights)
        self._packed = [_packed(layer) for layer in self.layers] if self._is_known() else []
        tiled = all(len(weight) % kernels.TILE_COLUMNS == 0 for weight, _ in self.head_layers)
        self._packed_head = (
            [(_panels(weight), _bias(weight, bias)) for weight, bias in self.head_layers]
            if self._packed and tiled
            else []
        )

    def _is_known(self) -> bool:
        matrices = [w for layer in self.layers for w in _matrices(layer)]
        tiled = all(len(w) % kernels.TILE_COLUMNS == w.shape[1] % 2 == 0 for w in matrices)
        norms = [x for layer in self.layers for x in (layer.attention_out_norm, layer.mlp_out_norm)]
        plain = all(norm is None for norm in norms)
        few = sum(w.nbytes for w in matrices) <= MOST_BYTES
        bf16 = self.linear_dtype == torch.bfloat16 and kernels.multiplies_bf16()
        return bf16 and tiled and plain and few

    def step(
        self,
        embeds_RD: Tensor,
        positions_R: Tensor,
        coords_RA: Tensor,
        cache: KeyValueCache,
        *,
        prompts: SharedPrompts,
        num_live: int,
    ) -> Tensor:
        if not self._packed:
            options = {"prompts": prompts, "num_live": num_live}
            return super().step(embeds_RD, positions_R, coords_RA, cache, **options)
        threads, states_RD = use_threads(), embeds_RD.clone()
        rotation = [as_array(table_R1E[:, 0]) for table_R1E in self.heads.rotation(coords_RA)]
        eps, head_eps = np.float32(self.norm_eps), np.float32(self.heads.norm_eps)
        states, positions = as_array(states_RD), as_array(positions_R)
        for index, (layer, norms) in enumerate(zip(self._packed, self.norms, strict=True)):
            held = self.backend.cache_arrays(cache, index)
            heads = (*rotation, *norm_arrays(norms), head_eps)
            kernels.run_layer(states, *layer, eps, *heads, positions, *held, threads)
        return self.backend.norm(states_RD, self.final_norm, eps=self.norm_eps, dtype=torch.float32)

    def logits(self, states_RD: Tensor, out_RV: Tensor | None = None) -> Tensor:
        if not self._packed_head or len(states_RD) % kernels.TILE_ROWS:
            return super().logits(states_RD, out_RV)
        *inner, last = self._packed_head
        for packed, bias in inner:
            states_RD = gelu(_times(states_RD, packed, bias))
        return _times(states_RD, *last, out_RV)


def _times(
    left_MK: Tensor, packed: np.ndarray, bias_N: np.ndarray, out_MN: Tensor | None = None
) -> Tensor:
    if out_MN is None:
        out_MN = left_MK.new_empty(len(left_MK), len(bias_N))
    arrays = as_array(left_MK), packed, bias_N, as_array(out_MN)
    kernels.multiply_rows(*arrays, use_threads())
    return out_MN


def _matrices(layer: FusedLayer) -> tuple[Tensor, ...]:
    return layer.wqkv, layer.wo, layer.w_gate_up, layer.w_down


def _packed(layer: FusedLayer) -> PackedLayer:
    wqkv, wo, w_gate_up, w_down = map(_panels, _matrices(layer))
    no_bias = np.zeros(max(map(len, _matrices(layer))), np.float32)
    norms = as_array(layer.attention_norm), as_array(layer.mlp_norm)
    bias = _bias(layer.wqkv, layer.bqkv)
    return PackedLayer(norms[0], wqkv, bias, wo, norms[1], w_gate_up, w_down, no_bias)


def _bias(weight_NK: Tensor, bias_N: Tensor | None) -> np.ndarray:
    return as_array(torch.zeros(len(weight_NK)) if bias_N is None else bias_N.float())


def _panels(weight_NK: Tensor) -> np.ndarray:
    """Panels of columns, in each of them row by row, or in bf16 by pairs of rows: what a tile reads
    from end to end.
    """
    if weight_NK.dtype == torch.bfloat16:
        weight_NK = weight_NK.view(torch.int32)
    panels = weight_NK.unflatten(0, (-1, kernels.TILE_COLUMNS)).transpose(1, 2)
    return panels.contiguous().numpy()
