"""The key-value cache and the attention of one new token per row over the live part of it.

Shape suffixes: B rows of the prefill (unique prompts), R rows of the decode, K key-value heads,
J query heads of one key-value head, S slots, E head dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of every layer, row, key-value head and slot, in fp32.

    Slots lie next to each other for a row and head, so that the live ones are one strided matrix.
    """

    keys: tuple[Tensor, ...]
    """By layer, RKSE."""
    values: tuple[Tensor, ...]

    @classmethod
    def empty(
        cls, num_layers: int, shape_RKSE: tuple[int, int, int, int], device: torch.device
    ) -> KeyValueCache:
        """Zeros: a slot that is masked still enters a product, so it must be finite."""
        layers = [torch.zeros((2, *shape_RKSE), device=device) for _ in range(num_layers)]
        return cls(tuple(layer[0] for layer in layers), tuple(layer[1] for layer in layers))

    @property
    def shape(self) -> torch.Size:
        """RKSE of one layer."""
        return self.keys[0].shape

    def fill(self, layer: int, keys_BKSE: Tensor, values_BKSE: Tensor, group_size: int) -> None:
        """Writes a prefill to the first slots, each of its rows to a group of rows."""
        num_rows, num_heads, num_slots, head_dim = keys_BKSE.shape
        grouped = (num_rows, group_size, num_heads, -1, head_dim)
        for cache, new in ((self.keys, keys_BKSE), (self.values, values_BKSE)):
            cache[layer].view(grouped)[:, :, :, :num_slots] = new[:, None]

    def append(self, layer: int, keys_RKE: Tensor, values_RKE: Tensor, place: Tensor) -> None:
        """Writes one slot per row and head at `place`, as `flat_places` gives it."""
        head_dim = keys_RKE.shape[-1]
        for cache, new in ((self.keys, keys_RKE), (self.values, values_RKE)):
            cache[layer].view(-1, head_dim).index_copy_(0, place, new.reshape(-1, head_dim))

    def flat_places(self, positions_R: Tensor) -> Tensor:
        """Where slot `positions_R` of every row and head lies among all slots of a layer."""
        num_rows, num_heads, num_slots, _ = self.shape
        first = torch.arange(num_rows * num_heads, device=positions_R.device) * num_slots
        return first + positions_R.repeat_interleave(num_heads)


def live_bias(positions_R: Tensor, num_live: int) -> Tensor:
    """0 for the slots a row has filled, -inf behind them; R1S."""
    slot_S = torch.arange(num_live, device=positions_R.device)
    behind_RS = slot_S > positions_R[:, None]
    return torch.zeros(behind_RS.shape, device=positions_R.device).masked_fill_(
        behind_RS, -math.inf
    )[:, None]


def decode_attention(
    query_RKJE: Tensor,
    keys_RKSE: Tensor,
    values_RKSE: Tensor,
    *,
    num_live: int,
    bias_R1S: Tensor | None,
) -> Tensor:
    """Attention of one token per row over the first `num_live` slots, RKJE, fp32.

    The bias hides what a row has not filled; None where every row has filled all live slots.
    On a CPU two batched products and a softmax take a third of the time of SDPA at one query.
    """
    num_rows, num_heads, num_queries, head_dim = query_RKJE.shape
    batch = num_rows * num_heads
    query = query_RKJE.reshape(batch, num_queries, head_dim)
    keys = keys_RKSE.view(batch, -1, head_dim)[:, :num_live]
    values = values_RKSE.view(batch, -1, head_dim)[:, :num_live]
    scores = torch.bmm(query * head_dim**-0.5, keys.transpose(1, 2))
    if bias_R1S is not None:
        scores.view(num_rows, -1, num_live).add_(bias_R1S)
    return torch.bmm(scores.softmax(-1), values).view(query_RKJE.shape)
