"""`stage bench gpu --part rollout`: drawing at the published sizes, and one step of it in kernels.

Shape suffixes: R rows, N images, T image tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from stage_rl.bench import rollout
from stage_rl.bench.base import BenchResult, flat, table
from stage_rl.bench.gpu import draw
from stage_rl.bench.gpu.checks import Checks, Sizes
from stage_rl.bench.models import policy_of
from stage_rl.bench.rollout import engine_form
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling, image_uniforms

GROUPS = {
    "attention": ("_attend", "_decode_attention"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "aten::mm", "aten::bmm", "addmm"),
    "small": ("_norm", "_rotate", "_swiglu"),
}
"""Parts of the names of kernels, or on a CPU of operations; all others are `other`."""
LONGEST = 12
"""Kernels that the table names."""
FORMATS = {"ms": ".3f", "calls": ".0f", "gb_per_s": ".0f"}


def drawing(sizes: Sizes) -> Checks:
    """The checks of this part."""
    options = {
        "num_prompts": sizes.num_prompts,
        "group_size": sizes.group_size,
        "rounds": sizes.rounds,
    }
    return {
        "rollout-1b": partial(rollout.run, model=sizes.small, **options),
        "rollout-7b": partial(rollout.run, model=sizes.large, **options),
        "draw": partial(draw.run, images=sizes.num_prompts * sizes.group_size),
        "profile-1b": partial(profile_step, sizes, sizes.small),
        "profile-7b": partial(profile_step, sizes, sizes.large),
    }


def profile_step(sizes: Sizes, model: str) -> BenchResult:
    """The kernels of one decode step with half of the image drawn, and what they read a second."""
    step, engine, num_live = middle_step(sizes, model)
    for _ in range(2):
        step()
    on_gpu = engine.policy.device.type == "cuda"
    # Else what is timed after it is timed with the profiler still attached.
    os.environ.setdefault("TEARDOWN_CUPTI", "1")
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities, acc_events=True) as found:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    microseconds, calls = Counter[str](), Counter[str]()
    for event in found.events() or ():
        if on_gpu and event.device_type == DeviceType.CUDA:
            microseconds[event.name] += event.time_range.elapsed_us()
        elif not on_gpu:
            microseconds[event.name] += event.self_cpu_time_total
        calls[event.name] += 1
    groups = grouped_ms(microseconds)
    shape = engine.decoder.cache_shape
    moved = {
        "attention": engine.passes[0].num_rows * shape.row_bytes(num_live),
        "matmul": engine.decoder.step_bytes,
    }
    rows = {group: {"ms": ms} for group, ms in groups.items()}
    for group, num_bytes in moved.items():
        if groups[group]:
            rows[group]["gb_per_s"] = num_bytes / groups[group] / 1e6
    measures = flat(rows)
    named = microseconds.most_common(LONGEST)
    rows |= {f"  {name[:60]}": {"ms": us / 1e3, "calls": calls[name]} for name, us in named}
    total = sum(groups.values())
    headline = f"a token takes {total:.2f} ms in kernels, attention {groups['attention']:.2f}, "
    headline += f"matmuls {groups['matmul']:.2f}"
    return BenchResult(headline, None, {**measures, "total_ms": total}, table(rows, FORMATS))


def grouped_ms(microseconds: Counter[str]) -> dict[str, float]:
    """Milliseconds by group."""
    groups = dict.fromkeys((*GROUPS, "other"), 0.0)
    for name, value in microseconds.items():
        matching = (g for g, parts in GROUPS.items() if any(part in name for part in parts))
        groups[next(matching, "other")] += value / 1e3
    return groups


def middle_step(sizes: Sizes, model: str) -> tuple[Callable[[], None], Engine, int]:
    """A call of one step in the middle of an image, as a pass before has captured it, its engine,
    and the live positions of a row.
    """
    policy = policy_of(model, sizes.device)
    prompts, sampling = sizes.prompts(model), Sampling(5.0)
    engine = Engine(policy, dtype="mixed")
    engine_form(engine, prompts, sizes.group_size, sampling)()
    (state,) = engine.states
    drawn = policy.layout.num_tokens // 2
    lengths_B = engine.passes[0].lengths_B
    uniforms_NT = image_uniforms(
        seed=0,
        step=0,
        prompt_indices=[prompt.index for prompt in prompts],
        group_size=sizes.group_size,
        num_tokens=policy.layout.num_tokens,
    )
    num_live = int(lengths_B.max()) + drawn
    logits_BV = state.logits_RV[:: sizes.group_size].clone()
    state.begin(uniforms_NT, logits_BV, lengths_B, column=drawn)
    # A captured step reads what is live; the bound is for a CPU, whose cache grows.
    bound = num_live + policy.layout.num_tokens // 4
    return torch.no_grad()(partial(state.advance, bound)), engine, num_live
