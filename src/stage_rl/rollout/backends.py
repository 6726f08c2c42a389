"""What a decoder computes between its matrix products, in torch; `kernels` has the GPU's form.

Shape suffixes: R rows of the decode, M rows x slots, D model width, F width of the MLP, H query
heads, K key-value heads, J query heads of one key-value head, S slots, E head dimension, C width
of queries, keys and values together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from stage_rl.errors import InputError
from stage_rl.rollout.attention import KeyValueCache, decode_attention, live_bias

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
