"""What a step reads and computes by formula, and from its times the rates it reached.

The formulas count what no implementation can leave out: the weights once per decoded token, the
live part of the cache, two operations per parameter and slot, and the products of attention. What
is computed twice, to save memory say, does not count, nor does what is not trained count less.

T image tokens, P slots of a prompt, S = P + T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stage_rl.rollout.decoder import Decoder
from stage_rl.rollout.engine import DrawnPass
from stage_rl.training.scoring import Scoring
from stage_rl.types import Rollout


@dataclass(frozen=True)
class DecoderSize:
    """The dimensions of a decoder that decide its work."""

    num_layers: int
    query_width: int
    """Query heads times their dimension."""
    trunk_parameters: int
    """Of the linear layers."""
    head_parameters: int
    weight_bytes: int
    """Read by one decode step, whatever its number of rows."""
    slot_bytes: int
    """Keys and values of one slot of one row, all layers."""

    @classmethod
    def of(cls, decoder: Decoder) -> DecoderSize:
        """The size of the sampler's copies."""
        cache, heads = decoder.cache_shape, decoder.heads
        linear = ("wqkv", "wo", "w_gate_up", "w_down")
        return cls(
            num_layers=cache.num_layers,
            query_width=heads.num_heads * heads.head_dim,
            trunk_parameters=sum(
                getattr(layer, name).numel() for layer in decoder.layers for name in linear
            ),
            head_parameters=sum(weight.numel() for weight, _ in decoder.head_layers),
            weight_bytes=decoder.step_bytes,
            slot_bytes=2
            * cache.num_layers
            * cache.num_heads
            * cache.head_dim
            * cache.dtype.itemsize,
        )


@dataclass(frozen=True)
class Drawn:
    """The extent of a rollout on one device, whatever its number of passes."""

    num_rows: int
    """Of the decode: images, with guidance twice."""
    num_tokens: int
    """T"""
    prompt_slots: float
    """P, the mean over the rows."""
    num_passes: int = 1

    @classmethod
    def of(cls, passes: Sequence[DrawnPass]) -> Drawn:
        """All passes of a rollout; their groups are equal, so each prompt has as many rows."""
        rows = [drawn.num_rows for drawn in passes]
        slots = [drawn.num_rows * drawn.lengths_B.float().mean().item() for drawn in passes]
        return cls(sum(rows), passes[0].num_tokens, sum(slots) / sum(rows), len(passes))


def rollout_bytes(size: DecoderSize, drawn: Drawn) -> float:
    """Bytes that the decode steps read: in each pass T times the weights, and by each row its live
    slots, T P + T (T + 1) / 2 of them.
    """
    tokens = drawn.num_tokens
    live_slots = tokens * drawn.prompt_slots + tokens * (tokens + 1) / 2
    weights = drawn.num_passes * tokens * size.weight_bytes
    return weights + drawn.num_rows * size.slot_bytes * live_slots


def row_flops(size: DecoderSize, drawn: Drawn) -> float:
    """Operations of a forward pass of one row: 2 x (trunk x S + image head x T) and in attention
    4 x layers x width x S (S + 1) / 2, what lies behind a slot left out.
    """
    slots = drawn.prompt_slots + drawn.num_tokens
    products = 2 * (size.trunk_parameters * slots + size.head_parameters * drawn.num_tokens)
    return products + 2 * size.num_layers * size.query_width * slots * (slots + 1)


def rates(
    size: DecoderSize,
    drawn: Drawn,
    times: Mapping[str, float],
    *,
    num_images: int,
    scoring: Scoring,
    num_updates: int,
) -> dict[str, float]:
    """What one device reached in each phase, GB/s and TFLOP/s (powers of 10).

    A backward pass counts as two forward passes.
    """
    row = row_flops(size, drawn)
    forward = num_images * row * (2 if scoring.has_two_passes else 1)
    backward = 2 * num_images * row * (2 if scoring.has_two_gradients else 1)
    flops = {
        "sample": drawn.num_rows * row,
        "reference": forward,
        "learn": num_updates * (forward + backward),
    }
    numbers = {
        f"throughput/{phase}_tflop_per_s": count / times[f"time/{phase}_s"] / 1e12
        for phase, count in flops.items()
    }
    read = rollout_bytes(size, drawn)
    numbers["throughput/sample_gb_per_s"] = read / times["time/sample_s"] / 1e9
    return numbers


def overall_rates(
    num_images: int, rollout: Rollout, times: Mapping[str, float]
) -> dict[str, float]:
    """Images and image tokens per second of all devices, over the step and over its sampling."""
    images_per_s = num_images / times["time/step_s"]
    return {
        "images_per_s": images_per_s,
        "tokens_per_s": images_per_s * rollout.tokens_NT.shape[1],
        "throughput/sample_images_per_s": num_images / times["time/sample_s"],
    }
