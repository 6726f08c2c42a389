"""What a rollout and a training pass must move and compute, and how fast the machine can.

Symbols of the formulas: R rows, P prompt slots, T image tokens, L layers, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stage_rl.bench.base import interleaved
from stage_rl.rollout.attention import BLOCK
from stage_rl.rollout.decoder import Decoder

PASSES_OF_A_STEP = 4
"""Forward passes whose work a step does: reference 1, policy 1, its backward pass 2."""


@dataclass(frozen=True)
class Work:
    """The sizes of a rollout."""

    num_images: int
    prompt_slots: int
    num_tokens: int
    guided: bool

    @property
    def num_rows(self) -> int:
        """Rows of the decode."""
        return self.num_images * (2 if self.guided else 1)

    def rollout_bytes(self, decoder: Decoder) -> float:
        """Weights once a token, and of the cache each row's live slots: T P + T (T + 1) / 2."""
        slots = self.num_tokens * self.prompt_slots + self.num_tokens * (self.num_tokens + 1) / 2
        slot_bytes = decoder.cache_shape.row_bytes(BLOCK) / BLOCK
        return self.num_tokens * decoder.step_bytes + self.num_rows * slot_bytes * slots

    def pass_flops(self, decoder: Decoder) -> float:
        """One teacher-forced forward pass: 2 for each weight and slot, and causal attention."""
        num_slots = self.prompt_slots + self.num_tokens - 1
        layers = decoder.layers
        weights = sum(
            part.numel() for x in layers for part in (x.wqkv, x.wo, x.w_gate_up, x.w_down)
        )
        head = sum(weight.numel() for weight, _ in decoder.head_layers)
        heads = decoder.heads
        # Scores and mix, 2 x 2 S^2 D a layer, of which causal attention needs half.
        attention = 2 * num_slots**2 * heads.num_heads * heads.head_dim * len(layers)
        row = 2 * weights * num_slots + 2 * head * self.num_tokens + attention
        return self.num_images * row


def copy_bytes_per_s(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy reads and writes, far larger than what a processor caches."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, 5, clock=clock)["copy"]


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / interleaved({"product": lambda: matrix @ matrix}, 5)["product"]
