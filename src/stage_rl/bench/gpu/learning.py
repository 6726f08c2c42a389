"""`stage bench gpu`, parts `train-1b` and `step-7b`: steps, their memory and their shards."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.profiler import ProfilerActivity, profile

from stage_rl.bench import step
from stage_rl.bench.base import BenchResult, flat, table
from stage_rl.bench.fsdp2 import SAVED_AT, STEPS, differences, trace
from stage_rl.bench.gpu.checks import Checks, Sizes
from stage_rl.bench.models import ADAPTER_7B, recipe_of
from stage_rl.distributed import SINGLE, World, release_unused
from stage_rl.recipe import Recipe
from stage_rl.training.loop import train_step
from stage_rl.training.memory import GB, predict
from stage_rl.training.trainer import build_trainer

PHASES = ("sample", "reference", "learn")
MAX_FARTHEST = 0.15
"""Between the memory that is predicted and what tensors take."""
LR = 1e-5
IN_FP32 = (
    *("rollout.dtype=float32", "training.dtype=float32", "rollout.guidance_scale=1"),
    *("training.groups_per_microbatch=1", "optimizer.warmup_steps=0", f"optimizer.lr={LR}"),
)
MAX_GRADIENT = 1e-4
"""Relative difference of gradients in fp32, whose sums a GPU adds in an order of its own."""


def train_1b(sizes: Sizes) -> Checks:
    """The checks of this part."""
    steps = _options(sizes, sizes.small)
    compiled = f"{sizes.overrides} training.compile=true"
    return {
        "plain": partial(step.run, **steps, overrides=sizes.overrides),
        "compiled": partial(step.run, **steps, overrides=compiled),
        "memory": partial(memory_of_steps, sizes, sizes.small, sizes.overrides, 3),
        "shards": partial(shards_of_one, sizes),
        "backend": partial(attention_backends, sizes),
        "streamed": partial(streamed_reference, sizes),
    }


def step_7b(sizes: Sizes) -> Checks:
    """The checks of this part."""
    steps = _options(sizes, sizes.large)
    adapter = f"{ADAPTER_7B} {sizes.overrides}"
    return {
        "full": partial(step.run, **steps, overrides=sizes.overrides),
        "full-memory": partial(memory_of_steps, sizes, sizes.large, sizes.overrides, 2),
        "lora": partial(step.run, **steps, overrides=adapter),
        "lora-memory": partial(memory_of_steps, sizes, sizes.large, adapter, 2),
    }


def memory_of_steps(sizes: Sizes, model: str, overrides: str, num_steps: int) -> BenchResult:
    """Memory by phase, predicted and, on a GPU, in tensors and held by the allocator, step by step.

    The first step makes what stays, so the others are held against the prediction.
    """
    recipe = _recipe(sizes, model, overrides)
    size = recipe.policy.size()
    assert size is not None, model
    trainer = build_trainer(recipe, recipe.prompts.build())
    length = int(trainer.policy.encode(trainer.prompts_of(0)).lengths_P.max())
    totals = predict(recipe, size, prompt_length=length).totals
    rows: dict[str, dict[str, float]] = {
        f"predicted {phase}": {"allocated_gb": totals[phase] / GB} for phase in PHASES
    }
    worst = 0.0
    for number in range(num_steps):
        timings = train_step(trainer, number).timer.timings
        for phase in PHASES:
            seen = {
                f"{kind}_gb": timings[key] * 2**30 / GB
                for kind, name in (("allocated", ""), ("reserved", "_reserved"))
                if (key := f"memory/{phase}{name}_gib") in timings
            }
            rows[f"step {number + 1} {phase}"] = seen
            if seen and number:
                far = abs(totals[phase] / GB / seen["allocated_gb"] - 1)
                worst = max(worst, far)
    measured = trainer.policy.device.type == "cuda"
    text = f"farthest from the prediction by {worst:.0%}" if measured else "predicted alone"
    lines = table(rows, {"allocated_gb": ".1f", "reserved_gb": ".1f"})
    return BenchResult(text, worst <= MAX_FARTHEST if measured else None, flat(rows), lines)


class OneOfOne(World):
    """The only process of a run, with its parameters in shards all the same."""

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in shards."""
        return True


def shards_of_one(sizes: Sizes) -> BenchResult:
    """Steps in fp32 under FSDP2 in a world of one against plain ones, saved and resumed by each.

    Of few images: what is compared does not depend on how many, and fp32 is slow.
    """
    settings = [*sizes.overrides.split(), *IN_FP32]
    recipe = recipe_of(sizes.small, settings, num_prompts=2, group_size=2)
    with tempfile.TemporaryDirectory() as name:
        one, other = Path(name, "one"), Path(name, "other")
        alone = trace(recipe, SINGLE, range(STEPS), save_to=one)
        with process_group(sizes.device):
            release_unused()
            several = trace(recipe, OneOfOne(), range(STEPS), save_to=other)
            release_unused()
            resumed = trace(recipe, OneOfOne(), range(SAVED_AT, STEPS), resume=one)
        release_unused()
        back = trace(recipe, SINGLE, range(SAVED_AT, STEPS), resume=other)
    found = differences(alone, several, resumed=resumed, back=back)
    farthest = max(value for key, value in found.items() if key.startswith("parameters"))
    # Adam moves a parameter by the rate at most, and a gradient near 0 may be of either sign.
    reached = found["gradients_relative"] <= MAX_GRADIENT and farthest <= 2 * STEPS * LR
    headline = f"gradients within {found['gradients_relative']:.0e}, parameters within "
    headline += f"{farthest:.0e}, {found['tokens_identical']:.1%} of the tokens identical"
    return BenchResult(headline, reached, found)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of this process alone, inside the block."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def attention_backends(sizes: Sizes) -> BenchResult:
    """The forms of torch's attention that a training step calls."""
    recipe = _recipe(sizes, sizes.small, sizes.overrides)
    trainer = build_trainer(recipe, recipe.prompts.build())
    train_step(trainer, 0)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        train_step(trainer, 1)
    calls = Counter(e.name for e in found.events() or () if "_scaled_dot_product_" in e.name)
    named = {name.removeprefix("aten::_scaled_dot_product_"): n for name, n in calls.items()}
    text = ", ".join(f"{name} {number} times" for name, number in named.items())
    measures = {name: float(number) for name, number in named.items()}
    return BenchResult(text or "none of torch's forms", None, measures)


def streamed_reference(sizes: Sizes) -> BenchResult:
    """A reference read from host memory against one on the GPU: its numbers, time and memory."""
    rows, measured = {}, []
    for where in ("resident", "streamed"):
        overrides = f"{sizes.overrides} training.reference={where}"
        recipe = _recipe(sizes, sizes.small, overrides)
        trainer = build_trainer(recipe, recipe.prompts.build())
        results = [train_step(trainer, number) for number in range(2)]
        measured.append(results[0].reference.logprobs_NT.cpu())
        timings = results[1].timer.timings
        gib = timings.get("memory/learn_gib", math.nan)
        rows[where] = {"reference_s": timings["time/reference_s"]}
        rows[where] |= {} if math.isnan(gib) else {"learn_gb": gib * 2**30 / GB}
    difference = (measured[0] - measured[1]).abs().max().item()
    lines = table(rows, {"reference_s": ".3f", "learn_gb": ".1f"})
    text = f"log-probabilities differ by {difference:.0e} at most"
    return BenchResult(text, difference == 0, {**flat(rows), "difference": difference}, lines)


def _options(sizes: Sizes, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "num_prompts": sizes.num_prompts,
        "group_size": sizes.group_size,
        "rounds": sizes.rounds,
    }


def _recipe(sizes: Sizes, model: str, overrides: str) -> Recipe:
    return recipe_of(
        model, overrides.split(), num_prompts=sizes.num_prompts, group_size=sizes.group_size
    )
