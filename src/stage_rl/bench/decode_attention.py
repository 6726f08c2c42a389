"""`stage bench decode-attention`: the Triton kernel against what a copy moves.

On a CPU the kernel runs in Triton's interpreter, which says nothing about time: only its results
are compared with torch.

Shape suffixes: R rows, K key-value heads, E head dimension.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import torch

from stage_rl.bench.base import BenchResult, at_least, copy_bytes_per_s, interleaved
from stage_rl.bench.models import bench_device
from stage_rl.errors import InputError
from stage_rl.rollout.attention import CacheShape, KeyValueCache, live_bias
from stage_rl.rollout.attention import decode_attention as eager_attention

BAR = ">= 80% of a copy's bytes a second at length >= 256 (GPU), difference from torch <= 1e-2"
LEAST_SHARE = 0.8
FROM_LENGTH = 256
LARGEST_DIFFERENCE = 1e-2


def run(
    *,
    rows: tuple[int, ...] = (2, 16, 128),
    heads: int = 32,
    head_dim: int = 128,
    lengths: tuple[int, ...] = (32, 128, 256, 606),
    rounds: int = 20,
) -> BenchResult:
    """Attention of one token per row over a bf16 cache, for every number of rows and length.

    On a CPU 2 rows of 2 heads in fp32 and bf16, for correctness alone, whatever the options say.
    """
    settings = dict(locals())
    at_least(1, rows=rows, heads=heads, head_dim=head_dim, lengths=lengths, rounds=rounds)
    device = bench_device()
    if find_spec("triton") is None:
        raise InputError("decode-attention needs triton; write: pip install 'stage-rl[triton]'")
    if device.type == "cpu":
        return _interpreted(rounds)
    rate = copy_bytes_per_s(device)
    measures, table = {"copy_gb_per_s": rate / 1e9}, []
    shape = CacheShape(1, heads, head_dim, torch.bfloat16)
    for num_rows, length in itertools.product(rows, lengths):
        name = f"r{num_rows}_l{length}"
        measures |= _timed(shape, num_rows, length, rounds=rounds, name=name)
        share = measures[f"gb_per_s_{name}"] * 1e9 / rate
        measures[f"share_{name}"] = share
        table.append(
            f"rows {num_rows:>4} length {length:>4} {measures[f'us_{name}']:>9.1f} us "
            f"{measures[f'gb_per_s_{name}']:>8.0f} GB/s {share:>6.0%} of a copy"
        )
    judged = [f"r{max(rows)}_l{length}" for length in lengths if length >= FROM_LENGTH]
    worst = min((measures[f"share_{name}"] for name in judged), default=None)
    difference = max(value for name, value in measures.items() if name.startswith("difference"))
    headline = "no length that the bar is set for" if worst is None else f"{worst:.0%} of a copy"
    reached = worst is not None and worst >= LEAST_SHARE
    return BenchResult(
        name="decode-attention",
        headline=f"{headline} with {max(rows)} rows, difference {difference:.0e}",
        bar=BAR,
        reached=None if worst is None else reached and difference <= LARGEST_DIFFERENCE,
        settings=settings,
        measures=measures,
        table=tuple(table),
    )


def _interpreted(rounds: int) -> BenchResult:
    # Triton chooses its interpreter when it is imported, and here it may have been.
    script = "from stage_rl.bench.decode_attention import print_differences; print_differences()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    measures = json.loads(done.stdout.splitlines()[-1])
    worst = {
        name: max(value for key, value in measures.items() if f"_{name}_" in key)
        for name in ("fp32", "bf16")
    }
    return BenchResult(
        name="decode-attention",
        headline=f"no GPU, so correctness alone, in Triton's interpreter: difference from torch "
        f"{worst['fp32']:.0e} in fp32, {worst['bf16']:.0e} with a bf16 cache",
        bar=BAR,
        reached=None,
        settings={"rows": (2,), "heads": 2, "head_dim": 16, "rounds": rounds},
        measures=measures,
    )


def print_differences() -> None:
    """Prints differences from torch as JSON, by precision and length."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {
        f"difference_{name}_l{length}": _difference(CacheShape(1, 2, 16, dtype), 2, length)
        for name, dtype in dtypes.items()
        for length in (1, 31, 64, 65, 200)
    }
    print(json.dumps(found))


def _timed(
    shape: CacheShape, num_rows: int, length: int, *, rounds: int, name: str
) -> dict[str, float]:
    """Time, bytes a second and difference from torch at one length."""
    from stage_rl.rollout.kernels import decode_attention

    query, cache, positions_R = _inputs(shape, num_rows, length)
    keys, values = cache.keys[0], cache.values[0]
    seconds = interleaved(
        {"kernel": lambda: decode_attention(query, keys, values, positions_R)}, rounds, calls=20
    )["kernel"]
    moved = 2 * num_rows * shape.num_heads * shape.head_dim * length * shape.dtype.itemsize
    return {
        f"us_{name}": seconds * 1e6,
        f"gb_per_s_{name}": moved / seconds / 1e9,
        f"difference_{name}": _difference(shape, num_rows, length),
    }


def _difference(shape: CacheShape, num_rows: int, length: int) -> float:
    """Largest difference of the kernel, whole and split, from torch."""
    from stage_rl.rollout.kernels import decode_attention

    query, cache, positions_R = _inputs(shape, num_rows, length)
    keys, values = cache.keys[0], cache.values[0]
    theirs = eager_attention(query, keys, values, live_bias(positions_R, length))
    return max(
        (decode_attention(query, keys, values, positions_R, num_parts=n) - theirs)
        .abs()
        .max()
        .item()
        for n in (1, 4)
    )


def _inputs(
    shape: CacheShape, num_rows: int, length: int
) -> tuple[torch.Tensor, KeyValueCache, torch.Tensor]:
    """A query, a random cache and the position of the last live slot in every row."""
    device = bench_device()
    cache = KeyValueCache.empty(shape, num_rows, length, device)
    generator = torch.Generator(device).manual_seed(0)
    for part in (*cache.keys, *cache.values):
        part.normal_(generator=generator)
    query_shape = (num_rows, shape.num_heads, 1, shape.head_dim)
    query = torch.randn(query_shape, device=device, generator=generator)
    return query, cache, torch.full((num_rows,), length - 1, device=device)
