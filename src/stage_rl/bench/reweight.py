"""`stage bench reweight`: the similarity of equation 6 as one product against the loop over pairs.

Shape suffixes: P prompts, G group, T image tokens, C codebook channels.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from stage_rl.algorithm import opposing_similarity
from stage_rl.bench.base import BenchResult, at_least, interleaved, one_thread

BAR = ">= 10x at G = 8 and >= 30x at G = 64 (T = 144, one thread), difference <= 1e-6"

LEAST_SPEEDUP = {8: 10.0, 64: 30.0}
LARGEST_DIFFERENCE = 1e-6


def pair_loop_similarity(codes_PGTC: Tensor, advantages_PG: Tensor) -> Tensor:
    """Equations 5 and 6 as written, sim_PGT: for every i, each j != i with A_i A_j <= 0."""
    return torch.stack(
        [
            _group_similarity(codes_GTC, advantages)
            for codes_GTC, advantages in zip(codes_PGTC, advantages_PG.tolist(), strict=True)
        ]
    )


def _group_similarity(codes_GTC: Tensor, advantages: list[float]) -> Tensor:
    sim_GT = codes_GTC.new_zeros(codes_GTC.shape[:2])
    for i, advantage in enumerate(advantages):
        opponents = [j for j, other in enumerate(advantages) if j != i and advantage * other <= 0]
        for j in opponents:
            sim_GT[i] += F.cosine_similarity(codes_GTC[i], codes_GTC[j], dim=-1)
        if opponents:
            sim_GT[i] /= len(opponents)
    return sim_GT


def run(
    *,
    group_sizes: tuple[int, ...] = (8, 64),
    num_tokens: int = 144,
    channels: int = 8,
    rounds: int = 9,
    seed: int = 0,
) -> BenchResult:
    """Times both forms for random codes of one group, half of it on each side of 0.

    On one thread, in processor time.
    """
    at_least(2, group_sizes=group_sizes)
    at_least(1, num_tokens=num_tokens, channels=channels, rounds=rounds)
    at_least(0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    measures: dict[str, float] = {}
    for group_size in group_sizes:
        codes_PGTC = torch.randn(1, group_size, num_tokens, channels, generator=generator)
        advantages_PG = torch.linspace(-1, 1, group_size)[None]
        measures |= _measure(codes_PGTC, advantages_PG, rounds)
    return BenchResult(
        name="reweight",
        headline=", ".join(
            f"{measures[f'speedup_g{size}']:.1f}x the pair loop at G = {size}"
            for size in group_sizes
        ),
        bar=BAR,
        reached=_reached(measures, group_sizes, num_tokens),
        settings={
            "group_sizes": group_sizes,
            "num_tokens": num_tokens,
            "channels": channels,
            "rounds": rounds,
            "seed": seed,
        },
        measures=measures,
    )


def _measure(codes_PGTC: Tensor, advantages_PG: Tensor, rounds: int) -> dict[str, float]:
    size = advantages_PG.shape[1]
    forms = {
        "product": lambda: opposing_similarity(codes_PGTC, advantages_PG),
        "pairs": lambda: pair_loop_similarity(codes_PGTC, advantages_PG),
    }
    with one_thread():
        seconds = interleaved(forms, rounds, calls=10, timer=time.thread_time)
        difference = (forms["product"]() - forms["pairs"]()).abs().max().item()
    return {
        f"product_ms_g{size}": seconds["product"] * 1e3,
        f"pairs_ms_g{size}": seconds["pairs"] * 1e3,
        f"speedup_g{size}": seconds["pairs"] / seconds["product"],
        f"difference_g{size}": difference,
    }


def _reached(
    measures: dict[str, float], group_sizes: tuple[int, ...], num_tokens: int
) -> bool | None:
    judged = [size for size in group_sizes if size in LEAST_SPEEDUP and num_tokens == 144]
    if not judged:
        return None
    return all(
        measures[f"speedup_g{size}"] >= LEAST_SPEEDUP[size]
        and measures[f"difference_g{size}"] <= LARGEST_DIFFERENCE
        for size in judged
    )
