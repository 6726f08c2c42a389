"""The decoder with fused, static copies of a policy's weights: prefill, and a step of one token.

Shape suffixes: B rows of the prefill, R rows of the decode, L prompt slots, M rows x slots,
D model width, H query heads, K key-value heads, J query heads of one key-value head, S slots,
E head dimension, V codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, rms_norm, scaled_dot_product_attention, silu

from stage_rl.policies.base import DecoderWeights, LayerWeights
from stage_rl.rollout.attention import KeyValueCache, decode_attention, live_bias

LINEAR_DTYPES = {"float32": torch.float32, "mixed": torch.bfloat16}


@dataclass(frozen=True)
class FusedLayer:
    """One layer's copies: three projections in one matrix, gate and up in another."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    mlp_norm: Tensor
    w_gate_up: Tensor
    w_down: Tensor

    @classmethod
    def like(cls, layer: LayerWeights, dtype: torch.dtype) -> FusedLayer:
        """Empty copies with linear weights of a dtype and norms in fp32."""
        parts = (layer.bq, layer.bk, layer.bv, layer.q_norm, layer.k_norm)
        assert all(part is None for part in parts), "biases and QK norms are not copied yet"

        def rows(*weights: Tensor) -> Tensor:
            shape = (sum(len(weight) for weight in weights), weights[0].shape[1])
            return torch.empty(shape, dtype=dtype, device=weights[0].device)

        return cls(
            attention_norm=_empty_copy(layer.attention_norm),
            wqkv=rows(layer.wq, layer.wk, layer.wv),
            wo=rows(layer.wo),
            mlp_norm=_empty_copy(layer.mlp_norm),
            w_gate_up=rows(layer.w_gate, layer.w_up),
            w_down=rows(layer.w_down),
        )

    def load(self, layer: LayerWeights) -> None:
        """Copies the weights in place."""
        _stack_into(self.attention_norm, layer.attention_norm)
        _stack_into(self.wqkv, layer.wq, layer.wk, layer.wv)
        _stack_into(self.wo, layer.wo)
        _stack_into(self.mlp_norm, layer.mlp_norm)
        _stack_into(self.w_gate_up, layer.w_gate, layer.w_up)
        _stack_into(self.w_down, layer.w_down)


class Decoder:
    """A decoder-only transformer over fused copies; addresses never change after construction.

    `mixed` runs the linear layers of the trunk in bf16; norms, rotation, cache, attention and the
    image head stay in fp32.
    """

    def __init__(self, weights: DecoderWeights, *, dtype: str):
        self.linear_dtype = LINEAR_DTYPES[dtype]
        self.num_heads, self.num_kv_heads = weights.num_heads, weights.num_kv_heads
        self.head_dim, self.norm_eps = weights.head_dim, weights.norm_eps
        self.layers = [FusedLayer.like(layer, self.linear_dtype) for layer in weights.layers]
        self.final_norm = _empty_copy(weights.final_norm)
        self.token_embeds_VD = _empty_copy(weights.token_embeds_VD)
        self.head_layers = [
            (_empty_copy(weight), None if bias is None else _empty_copy(bias))
            for weight, bias in weights.head
        ]
        half = self.head_dim // 2
        sign_E = torch.ones_like(weights.rotary_sin_SR[0])
        sign_E[:half] = -1
        self.cos_S1E = weights.rotary_cos_SR.float()[:, None].clone()
        # The sign of the half rotation, (-x2, x1), is kept in the table of sines.
        self.sin_S1E = (weights.rotary_sin_SR.float() * sign_E)[:, None].clone()
        self.load(weights)

    @torch.no_grad()
    def load(self, weights: DecoderWeights) -> None:
        """Copies the weights in place, once per step."""
        for mine, layer in zip(self.layers, weights.layers, strict=True):
            mine.load(layer)
        self.final_norm.copy_(weights.final_norm)
        self.token_embeds_VD.copy_(weights.token_embeds_VD)
        for mine, (weight, bias) in zip(self.head_layers, weights.head, strict=True):
            mine[0].copy_(weight)
            if mine[1] is not None and bias is not None:
                mine[1].copy_(bias)

    def new_cache(self, num_rows: int, num_slots: int) -> KeyValueCache:
        """An empty cache for the rows of a decode."""
        shape = (num_rows, self.num_kv_heads, num_slots, self.head_dim)
        return KeyValueCache.empty(len(self.layers), shape, self.final_norm.device)

    def prefill(
        self, embeds_BLD: Tensor, lengths_B: Tensor, cache: KeyValueCache, *, group_size: int
    ) -> Tensor:
        """Runs right-padded prompts, writes each one's keys and values to its group of rows.

        Returns the last hidden state of each prompt, states_BD.
        """
        num_rows, num_slots, width = embeds_BLD.shape
        cos, sin = (x[:num_slots].repeat(num_rows, 1, 1) for x in (self.cos_S1E, self.sin_S1E))

        def attend(layer: int, qkv_M: Tensor) -> Tensor:
            query, keys, values = (
                part.view(num_rows, num_slots, -1, self.head_dim).transpose(1, 2)
                for part in self._rotated(qkv_M, cos, sin)
            )
            cache.fill(layer, keys, values, group_size)
            grouped = self.num_heads != self.num_kv_heads
            mixed = scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=grouped
            )
            return mixed.transpose(1, 2).reshape(num_rows * num_slots, -1)

        states_MD = self._run(embeds_BLD.reshape(-1, width).float(), attend)
        rows_B = torch.arange(num_rows, device=lengths_B.device)
        return states_MD.view(num_rows, num_slots, width)[rows_B, lengths_B - 1]

    def step(
        self, embeds_RD: Tensor, positions_R: Tensor, cache: KeyValueCache, *, num_live: int
    ) -> Tensor:
        """One token per row at its own slot, attending to the slots up to it; states_RD.

        Positions are a tensor; `num_live`, the largest of them plus 1, only bounds what is read.
        """
        cos, sin = self.cos_S1E[positions_R], self.sin_S1E[positions_R]
        places = cache.places(positions_R)
        bias = live_bias(positions_R, num_live)

        def attend(layer: int, qkv_R: Tensor) -> Tensor:
            query, keys, values = self._rotated(qkv_R, cos, sin)
            cache.append(layer, keys, values, places)
            query = query.view(len(query), self.num_kv_heads, -1, self.head_dim)
            mixed = decode_attention(query, cache.keys[layer], cache.values[layer], bias)
            return mixed.view(len(query), -1)

        return self._run(embeds_RD.clone(), attend)

    def logits(self, states: Tensor) -> Tensor:
        """The image head in fp32; the last axis goes from D to V."""
        *inner, (last_weight, last_bias) = self.head_layers
        for weight, bias in inner:
            states = gelu(linear(states, weight, bias))
        return linear(states, last_weight, last_bias)

    def _run(self, states_MD: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The layers over a residual stream in fp32, which is changed in place."""
        for index, layer in enumerate(self.layers):
            qkv = self._linear(self._norm(states_MD, layer.attention_norm), layer.wqkv)
            mixed = attend(index, qkv)
            states_MD += self._linear(mixed, layer.wo)
            gate_up = self._linear(self._norm(states_MD, layer.mlp_norm), layer.w_gate_up)
            gate, up = gate_up.chunk(2, -1)
            states_MD += self._linear(silu(gate) * up, layer.w_down)
        return self._norm(states_MD, self.final_norm)

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x.to(self.linear_dtype), weight)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.norm_eps)

    def _rotated(self, qkv_M: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values in fp32, MHE or MKE, the first two turned by their positions."""
        num_turned = self.num_heads + self.num_kv_heads
        heads_MHE = qkv_M.float().view(len(qkv_M), -1, self.head_dim)
        plain_MHE = heads_MHE[:, :num_turned]
        turned_MHE = plain_MHE * cos
        turned_MHE.addcmul_(plain_MHE.roll(self.head_dim // 2, -1), sin)
        query, keys = turned_MHE.split([self.num_heads, self.num_kv_heads], 1)
        return query, keys, heads_MHE[:, num_turned:]


def _empty_copy(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


def _stack_into(target: Tensor, *weights: Tensor) -> None:
    for part, weight in zip(target.split([len(w) for w in weights]), weights, strict=True):
        part.copy_(weight)
