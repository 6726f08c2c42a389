"""`stage bench decode-attention`: the Triton kernel against what a copy moves.

On a CPU the kernel runs in Triton's interpreter, which says nothing about time: only its results
are compared with torch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

import torch
from pydantic import PositiveInt
from torch import Tensor

from stage_rl.bench.base import BenchResult, copy_bytes_per_s, flat, interleaved, table
from stage_rl.bench.gpu.interpreter import in_interpreter
from stage_rl.distributed import pick_device
from stage_rl.errors import InputError
from stage_rl.rollout.attention import BLOCK, CacheShape, KeyValueCache, SharedPrompts, length_mask
from stage_rl.rollout.attention import decode_attention as eager_attention

BAR = ">= 80% of a copy's bytes a second at length >= 256 (GPU), difference from torch <= 1e-2"
MIN_SHARE = 0.8
FROM_LENGTH = 256
MAX_DIFFERENCE = 1e-2
ROWS = 128
"""Lengths that are compared at one time."""
GROUP = 8
"""Rows with one prompt, as long as a block: 32 positions, for the 29 of Janus-Pro's GenEval."""


def run(
    *,
    rows: tuple[PositiveInt, ...] = (2, 16, 128),
    heads: PositiveInt = 32,
    head_dim: PositiveInt = 128,
    lengths: tuple[PositiveInt, ...] = (32, 128, 256, 606),
    rounds: PositiveInt = 20,
) -> BenchResult:
    """Attention of one token per row over a bf16 cache, for every number of rows and length, in
    every form of the kernel; the bar is on the one that is used. Bytes are counted as if each row
    read its own prompt.

    On a CPU 2 rows of 2 heads in fp32 and bf16, for correctness alone, whatever the options say.
    """
    if find_spec("triton") is None:
        raise InputError("decode-attention needs triton; write: pip install 'stage-rl[triton]'")
    if not torch.cuda.is_available():
        return _interpreted()
    rate = copy_bytes_per_s(torch.device("cuda"))
    shape = CacheShape(1, heads, head_dim, torch.bfloat16)
    figures: dict[str, dict[str, float]] = {}
    for num_rows, length in itertools.product(rows, lengths):
        seconds, difference = _timed(shape, num_rows, length, rounds=rounds)
        moved = 2 * num_rows * heads * head_dim * length * shape.dtype.itemsize
        for form, taken in seconds.items():
            figures[f"{form}_r{num_rows}_l{length}"] = {
                "us": taken * 1e6,
                "gb_per_s": moved / taken / 1e9,
                "share": moved / taken / rate,
                "difference": difference,
            }
    judged = [f"{_form()}_r{max(rows)}_l{length}" for length in lengths if length >= FROM_LENGTH]
    worst = min((figures[name]["share"] for name in judged), default=None)
    difference = max(one["difference"] for one in figures.values())
    headline = "no length that the bar is set for" if worst is None else f"{worst:.0%} of a copy"
    reached = worst is not None and worst >= MIN_SHARE and difference <= MAX_DIFFERENCE
    return BenchResult(
        f"{headline} with {max(rows)} rows, difference {difference:.0e}",
        None if worst is None else reached,
        {"copy_gb_per_s": rate / 1e9, **flat(figures)},
        table(figures, {"us": ".1f", "gb_per_s": ".0f", "share": ".0%", "difference": ".0e"}),
    )


def _interpreted() -> BenchResult:
    measures = in_interpreter(__name__, "differences()")
    fp32, bf16 = (
        max(value for key, value in measures.items() if f"_{name}_" in key)
        for name in ("fp32", "bf16")
    )
    return BenchResult(
        "no GPU, so correctness alone, in Triton's interpreter: difference from torch "
        f"{fp32:.0e} in fp32, {bf16:.0e} with a bf16 cache",
        None,
        measures,
    )


def differences() -> dict[str, float]:
    """From torch, by precision and length."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {
        f"difference_{name}_l{length}": _difference(CacheShape(1, 2, 16, dtype), [length] * 2)
        for name, dtype in dtypes.items()
        for length in (1, 31, 64, 65, 200)
    }


def differences_of_lengths(heads: int, head_dim: int, num_lengths: int) -> dict[str, float]:
    """Largest difference from torch over every length up to `num_lengths`, by precision of the
    cache; without a GPU in the interpreter.
    """
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        call = f"differences_of_lengths({heads}, {head_dim}, {num_lengths})"
        return in_interpreter(__name__, call)
    lengths = range(1, num_lengths + 1)
    parts = [lengths[first : first + ROWS] for first in range(0, num_lengths, ROWS)]
    return {
        name: max(_difference(CacheShape(1, heads, head_dim, dtype), part) for part in parts)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def _form() -> str:
    from stage_rl.rollout.kernels import FORM  # triton is optional

    return FORM


def _timed(
    shape: CacheShape, num_rows: int, length: int, *, rounds: int
) -> tuple[dict[str, float], float]:
    """Seconds of each form at one length, and the difference from torch."""
    from stage_rl.rollout.kernels import FORMS, decode_attention  # triton is optional

    inputs = _inputs(shape, [length] * num_rows)
    calls = {form: partial(decode_attention, *inputs, form=form) for form in FORMS}
    return interleaved(calls, rounds, calls=20), _difference(shape, [length] * num_rows)


def _difference(shape: CacheShape, lengths: Sequence[int]) -> float:
    """Largest difference of the kernel, each form whole and split, from torch; a row a length."""
    from stage_rl.rollout.kernels import FORMS, decode_attention  # triton is optional

    query, keys, values, positions_R, prompts = _inputs(shape, lengths)
    ours = partial(decode_attention, query, keys, values, positions_R, prompts)
    theirs = eager_attention(query, keys, values, length_mask(positions_R, max(lengths)))
    return max(
        (ours(num_parts=parts, form=form) - theirs).abs().max().item()
        for form, parts in itertools.product(FORMS, (1, 4))
    )


def _inputs(
    shape: CacheShape, lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, SharedPrompts]:
    """A query, random keys and values, the last live position in every row, and the prompts."""
    device, num_rows = pick_device("auto"), len(lengths)
    cache = KeyValueCache.empty(shape, num_rows, max(lengths), device)
    generator = torch.Generator(device).manual_seed(0)
    row_R = torch.arange(num_rows, device=device)
    first_R = row_R - row_R % GROUP
    for part in (*cache.keys, *cache.values):
        part.normal_(generator=generator)
        part[0] = part[0, first_R]
    query_shape = (num_rows, shape.num_heads, 1, shape.head_dim)
    query = torch.randn(query_shape, device=device, generator=generator)
    positions_R = torch.tensor(lengths, device=device) - 1
    prompts = SharedPrompts(torch.full_like(row_R, BLOCK), first_R)
    return query, cache.keys[0], cache.values[0], positions_R, prompts
