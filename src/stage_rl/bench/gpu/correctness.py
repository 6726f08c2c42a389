"""`stage bench gpu --part correctness`: what a GPU computes, against torch and against itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from stage_rl.bench import mismatch
from stage_rl.bench.base import BenchResult, copy_bytes_per_s, matmul_flops_per_s, table
from stage_rl.bench.gpu.checks import Checks, Sizes
from stage_rl.bench.gpu.decode_attention import MAX_DIFFERENCE, differences_of_lengths
from stage_rl.bench.models import SIZES, policy_of, recipe_of
from stage_rl.bench.rollout import engine_form
from stage_rl.policies.matmul import tf32_matmul
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.loop import train_step
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt

MAX_FP32_DIFFERENCE = 1e-5
STEPS = 2
"""Of the two trainings that must draw the same tokens."""


def correctness(sizes: Sizes) -> Checks:
    """The checks of this part."""
    few = {"num_prompts": min(2, sizes.num_prompts), "group_size": 2}
    return {
        "rates": partial(rates, sizes.device),
        "tests": partial(gpu_tests, sizes),
        "kernels-1b": partial(kernels, sizes, sizes.small),
        "kernels-7b": partial(kernels, sizes, sizes.large),
        "graph": partial(captured_step, sizes),
        "lengths": partial(two_lengths, sizes),
        "mismatch": partial(mismatch.run, model=sizes.small, **few),
        "repeated": partial(repeated, sizes),
    }


def rates(device: torch.device) -> BenchResult:
    """What a copy moves and what a large matmul computes, on random numbers."""
    measures = {"copy_gb_per_s": copy_bytes_per_s(device) / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        with tf32_matmul(name == "tf32"):
            measures[f"{name}_tflop_per_s"] = matmul_flops_per_s(device, dtype) / 1e12
    headline = ", ".join(f"{name} {value:.1f}" for name, value in measures.items())
    return BenchResult(headline, None, measures)


def gpu_tests(sizes: Sizes) -> BenchResult:
    """The tests that are marked for a GPU, where the tests lie beside the package."""
    if not sizes.tests.is_dir() or find_spec("pytest") is None:
        return BenchResult("no tests beside the package, or no pytest; run a checkout", None, {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["-W", "default"]  # drivers and libraries of a GPU have warnings of their own
    command += ["--continue-on-collection-errors"]  # other tests may need what is not here
    done = subprocess.run(
        [*command, sizes.tests.name],
        cwd=sizes.tests.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = tuple(line for line in lines if line.startswith(("FAILED", "ERROR")))
    return BenchResult(lines[-1].strip("= "), done.returncode == 0, {}, failed)


def kernels(sizes: Sizes, model: str) -> BenchResult:
    """The attention kernel against torch at the heads of a model and at every length."""
    size = SIZES[model]
    found = differences_of_lengths(size.heads, size.width // size.heads, sizes.num_lengths)
    reached = found["fp32"] <= MAX_FP32_DIFFERENCE and found["bf16"] <= MAX_DIFFERENCE
    headline = f"{sizes.num_lengths} lengths, difference from torch {found['fp32']:.0e} in fp32, "
    headline += f"{found['bf16']:.0e} with a bf16 cache"
    return BenchResult(headline, reached, {f"difference_{k}": v for k, v in found.items()})


def captured_step(sizes: Sizes) -> BenchResult:
    """Tokens of a replayed graph against those of single steps; the first pass captures."""
    policy = policy_of(sizes.small, sizes.device)
    prompts = sizes.prompts(sizes.small)
    single = _drawn(sizes, Engine(policy, dtype="mixed", cuda_graph=False), prompts)
    engine = Engine(policy, dtype="mixed")
    replayed = [_drawn(sizes, engine, prompts) for _ in range(2)]
    return _same("replayed and single steps", [single] * 2, replayed)


def two_lengths(sizes: Sizes) -> BenchResult:
    """Prompts of one length after those of another, against an engine of their own each."""
    policy = policy_of(sizes.small, sizes.device)
    sets = [sizes.short_prompts, sizes.prompts(sizes.small), sizes.short_prompts]
    shared = Engine(policy, dtype="mixed")
    one_after_other = [_drawn(sizes, shared, prompts) for prompts in sets]
    alone = [_drawn(sizes, Engine(policy, dtype="mixed"), p) for p in sets]
    return _same("one engine and several", one_after_other, alone)


def repeated(sizes: Sizes) -> BenchResult:
    """Two trainings of one seed: tokens of the steps.

    The backward pass of attention adds up in any order unless torch is told otherwise, and one
    token that rounding changes changes the rest of its image.
    """
    found: list[list[Tensor]] = []
    for _ in range(2):
        recipe = recipe_of(
            sizes.small,
            sizes.overrides.split(),
            num_prompts=sizes.num_prompts,
            group_size=sizes.group_size,
        )
        trainer = build_trainer(recipe, recipe.prompts.build())
        with _deterministic():
            steps = [train_step(trainer, step) for step in range(STEPS)]
        found.append([one.rollout.tokens_NT.cpu() for one in steps])
    return _same("two trainings", *found)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms of torch: where it may only warn, attention keeps its own."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def _drawn(sizes: Sizes, engine: Engine, prompts: list[Prompt]) -> Tensor:
    return engine_form(engine, prompts, sizes.group_size, Sampling(5.0))().cpu()


def _same(what: str, some: list[Tensor], others: list[Tensor]) -> BenchResult:
    """The share of equal tokens, by pass or step."""
    shares = [(a == b).float().mean().item() for a, b in zip(some, others, strict=True)]
    rows = {f"pass {number + 1}": {"equal": share} for number, share in enumerate(shares)}
    text = f"{what}: {min(shares):.2%} of the tokens equal at worst"
    measures = {f"equal_{number + 1}": share for number, share in enumerate(shares)}
    return BenchResult(text, min(shares) == 1, measures, table(rows, {"equal": ".2%"}))
