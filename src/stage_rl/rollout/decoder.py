"""The decoder with fused, static copies of a policy's weights: prefill, and a step of one token.

Shape suffixes: B rows of the prefill, R rows of the decode, L prompt positions, M rows x positions,
D model width, C width of queries, keys and values together, H query heads, K key-value heads,
S positions, E head dimension, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

from stage_rl.distributed import full_tensor
from stage_rl.policies.base import DecoderWeights, LayerWeights
from stage_rl.policies.matmul import onednn_matmul, tf32_matmul
from stage_rl.rollout.attention import (
    FP8,
    Attend,
    Backend,
    CacheShape,
    HeadNorms,
    Heads,
    KeyValueCache,
    SharedPrompts,
    apply_rotary,
)

CACHE_DTYPES = ("auto", "fp8")
LINEAR_DTYPES = {"float32": torch.float32, "mixed": torch.bfloat16}


@dataclass(frozen=True)
class FusedLayer:
    """One layer's copies: three projections in one matrix, gate and up in another."""

    attention_norm: Tensor
    wqkv: Tensor
    bqkv: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    wo: Tensor
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    w_gate_up: Tensor
    w_down: Tensor
    mlp_out_norm: Tensor | None

    @classmethod
    def like(cls, layer: LayerWeights, dtype: torch.dtype) -> FusedLayer:
        """Empty copies with linear weights of a dtype and norms in fp32."""
        copies = {}
        for name, parts in _sources(layer).items():
            if not parts:
                copies[name] = None
                continue
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            kind = torch.float32 if "norm" in name else dtype
            copies[name] = torch.empty(shape, dtype=kind, device=parts[0].device)
        return cls(**copies)

    def load(self, layer: LayerWeights) -> None:
        """Copies the weights in place."""
        for name, parts in _sources(layer).items():
            target = getattr(self, name)
            assert (target is None) == (not parts), f"{name} comes or goes between two loads"
            if target is not None:
                for mine, part in zip(target.split([len(p) for p in parts]), parts, strict=True):
                    mine.copy_(full_tensor(part))

    @property
    def num_bytes(self) -> int:
        """What a step reads of this layer."""
        return sum(x.nbytes for f in fields(self) if (x := getattr(self, f.name)) is not None)


class Decoder:
    """A decoder-only transformer over fused copies; addresses never change after construction.

    `mixed` runs the linear layers of the trunk in bf16, the cache with them; norms, rotation,
    softmax and the image head stay in fp32. `cache_dtype` is `auto` or `fp8`.
    """

    def __init__(
        self, weights: DecoderWeights, *, dtype: str, backend: Backend, cache_dtype: str = "auto"
    ):
        self.linear_dtype, self.backend = LINEAR_DTYPES[dtype], backend
        self.norm_eps = weights.norm_eps
        self.layers = [FusedLayer.like(layer, self.linear_dtype) for layer in weights.layers]
        self.norms = [HeadNorms(x.q_norm, x.k_norm) for x in self.layers]
        self.final_norm = _empty_copy(weights.final_norm)
        self.input_embeds = _empty_copy(weights.input_embeds)
        self.head_layers = [
            (_empty_copy(weight), None if bias is None else _empty_copy(bias))
            for weight, bias in weights.head
        ]
        half = weights.head_dim // 2
        sign_E = torch.ones_like(weights.rotary_sin_SR[0])
        sign_E[:half] = -1
        self.heads = Heads(
            weights.num_heads,
            weights.num_kv_heads,
            weights.head_dim,
            weights.norm_eps,
            weights.rotary_cos_SR.float().contiguous(),
            (weights.rotary_sin_SR.float() * sign_E).contiguous(),
            weights.rotary_axis_R,
        )
        self.cache_shape = CacheShape(
            len(self.layers),
            weights.num_kv_heads,
            weights.head_dim,
            FP8 if cache_dtype == "fp8" else self.linear_dtype,
        )

    @torch.no_grad()
    def load(self, weights: DecoderWeights) -> None:
        """Copies the weights in place, once per step; layers are read one after another."""
        for mine, layer in zip(self.layers, weights.layers, strict=True):
            mine.load(layer)
        self.final_norm.copy_(weights.final_norm)
        self.input_embeds.copy_(weights.input_embeds)
        for mine, (weight, bias) in zip(self.head_layers, weights.head, strict=True):
            mine[0].copy_(weight)
            if mine[1] is not None and bias is not None:
                mine[1].copy_(bias)

    @property
    def step_bytes(self) -> int:
        """Weights that one step reads, whatever the number of rows."""
        head = sum(x.nbytes for layer in self.head_layers for x in layer if x is not None)
        return sum(layer.num_bytes for layer in self.layers) + self.final_norm.nbytes + head

    def new_cache(self, num_rows: int, num_positions: int) -> KeyValueCache:
        """An empty cache for the rows of a decode."""
        device, layout = self.final_norm.device, self.backend.layout
        shape = self.cache_shape
        return KeyValueCache.empty(shape, num_rows, num_positions, device, layout=layout)

    def prefill(
        self,
        embeds_BLD: Tensor,
        lengths_B: Tensor,
        coords_LA: Tensor,
        cache: KeyValueCache,
        *,
        group_size: int,
    ) -> Tensor:
        """Runs right-padded prompts, writes each one's keys and values to its group of rows.

        Positions rotate by `coords_LA`. Returns the last hidden state of each prompt, states_BD.
        """
        num_rows, num_positions, width = embeds_BLD.shape
        heads = self.heads
        cos, sin = (table.repeat(num_rows, 1, 1) for table in heads.rotation(coords_LA))

        def attend(layer: int, qkv_MC: Tensor, norms: HeadNorms) -> Tensor:
            query, keys, values = (
                part.view(num_rows, num_positions, -1, heads.head_dim).transpose(1, 2)
                for part in apply_rotary(qkv_MC, heads, norms, cos=cos, sin=sin)
            )
            cache.fill(layer, keys, values, group_size)
            grouped = heads.num_heads != heads.num_kv_heads
            mixed = scaled_dot_product_attention(
                query, keys, values, is_causal=True, enable_gqa=grouped
            )
            return mixed.transpose(1, 2).reshape(num_rows * num_positions, -1)

        inputs_MD = embeds_BLD.reshape(-1, width).to(torch.float32, copy=True)
        states_MD = self._run(inputs_MD, attend, Backend())
        rows_B = torch.arange(num_rows, device=lengths_B.device)
        return states_MD.view(num_rows, num_positions, width)[rows_B, lengths_B - 1]

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
        """One token per row at its own position and coordinates, states_RD; `Backend.attention`."""
        attend = self.backend.attention(
            self.heads, cache, positions_R, coords_RA, prompts, num_live
        )
        return self._run(embeds_RD.clone(), attend, self.backend)

    def logits(self, states_RD: Tensor, out_RV: Tensor | None = None) -> Tensor:
        """The image head in fp32, logits_RV, into `out_RV` where it is given.

        On a GPU with bf16 trunk its matmuls take TF32.
        """
        *inner, (last_weight, last_bias) = self.head_layers
        with tf32_matmul(self.linear_dtype == torch.bfloat16), onednn_matmul(states_RD.device):
            for weight, bias in inner:
                states_RD = gelu(linear(states_RD, weight, bias))
            if last_bias is None:
                return torch.mm(states_RD, last_weight.T, out=out_RV)
            return torch.addmm(last_bias, states_RD, last_weight.T, out=out_RV)

    def _run(self, states_MD: Tensor, attend: Attend, backend: Backend) -> Tensor:
        """The layers over a residual stream in fp32, which is changed in place."""
        dtype, last = self.linear_dtype, len(self.layers) - 1
        norm = partial(backend.norm, states_MD, eps=self.norm_eps)
        normed = norm(self.layers[0].attention_norm, dtype=dtype)
        for index, layer in enumerate(self.layers):
            mixed = attend(index, linear(normed, layer.wqkv, layer.bqkv), self.norms[index])
            delta = linear(mixed.to(dtype), layer.wo)
            normed = norm(
                layer.mlp_norm, dtype=dtype, delta_MD=delta, delta_norm_D=layer.attention_out_norm
            )
            delta = linear(backend.swiglu(linear(normed, layer.w_gate_up)), layer.w_down)
            # The next norm is the next layer's; behind the last layer the head reads fp32.
            after = self.final_norm if index == last else self.layers[index + 1].attention_norm
            kind = torch.float32 if index == last else dtype
            normed = norm(after, dtype=kind, delta_MD=delta, delta_norm_D=layer.mlp_out_norm)
        return normed


def _sources(layer: LayerWeights) -> dict[str, list[Tensor]]:
    """What each fused copy stacks; empty where the family has no such part."""
    stacks = {
        "attention_norm": (layer.attention_norm,),
        "wqkv": (layer.wq, layer.wk, layer.wv),
        "bqkv": (layer.bq, layer.bk, layer.bv),
        "q_norm": (layer.q_norm,),
        "k_norm": (layer.k_norm,),
        "wo": (layer.wo,),
        "attention_out_norm": (layer.attention_out_norm,),
        "mlp_norm": (layer.mlp_norm,),
        "w_gate_up": (layer.w_gate, layer.w_up),
        "w_down": (layer.w_down,),
        "mlp_out_norm": (layer.mlp_out_norm,),
    }
    present = {name: [p for p in parts if p is not None] for name, parts in stacks.items()}
    assert len(present["bqkv"]) in (0, 3), "queries, keys and values have a bias each, or none"
    return present


def _empty_copy(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)
