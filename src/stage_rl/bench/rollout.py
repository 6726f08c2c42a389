"""`stage bench rollout`: the engine against transformers' own generate, on the same weights.

Shape suffixes: P prompts, N images, R rows (N conditional, then N unconditional), L positions of a
prompt, T image tokens, D width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from stage_rl.bench.base import (
    BenchResult,
    Guidance,
    copy_bytes_per_s,
    flat,
    interleaved,
    on_h200,
    seconds_of,
    table,
)
from stage_rl.bench.models import SIZES, policy_of, prompts_of
from stage_rl.distributed import pick_device
from stage_rl.policies.base import Policy
from stage_rl.policies.trunk import INPUT_NORMS
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.training.metrics import DecoderSize, RolloutStats, rollout_bytes
from stage_rl.types import Prompt

BAR = (
    ">= 3x generate with bf16 linear layers, >= 1.2x in fp32 with identical greedy tokens "
    "(CPU, shapes model, 64 images); one H200: janus-7b <= 6.2 s, >= 70% of the byte limit, >= 3x "
    "generate, >= 8x the growing cache; janus-1b >= 60% of the byte limit"
)
MIN_ON_CPU = {"mixed_speedup": 3.0, "float32_speedup": 1.2, "greedy_equal": 1.0}
MIN_ON_H200 = {
    "janus-7b": {
        "mixed_images_per_s": 64 / 6.2,
        "mixed_byte_limit_share": 0.7,
        "mixed_speedup": 3.0,
        "mixed_speedup_over_growing": 8.0,
    },
    "janus-1b": {"mixed_byte_limit_share": 0.6},
}
WINDOW = 16
"""Tokens of a window of the growing cache."""
NUM_WINDOWS = 5
FORMATS = {
    "s": ".2f",
    "ms_per_token": ".2f",
    "images_per_s": ".2f",
    "gb_per_s": ".1f",
    "byte_limit_share": ".0%",
}


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 8,
    group_size: PositiveInt = 8,
    guidance_scale: Guidance = 5.0,
    rounds: PositiveInt = 5,
    processor_time: bool = False,
) -> BenchResult:
    """Samples the same number of images in several ways, in turn.

    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights in
    bf16. The ways: the engine in both precisions, and in bf16 by torch's operations (a size: mixed,
    and with a cache in fp8), generate, and, from windows of tokens, a loop over a cache that grows
    with every token.
    `processor_time` counts what the processors of this process worked, for a CPU that others use
    too.
    """
    timer = time.process_time if processor_time else time.perf_counter
    policy, prompts = policy_of(model, pick_device("auto")), prompts_of(model, num_prompts)
    images = [prompt for prompt in prompts for _ in range(group_size)]
    baseline = with_plain_layers(policy.reference())
    engines = {"mixed": Engine(policy, dtype="mixed")}
    if model in SIZES:
        engines["fp8"] = Engine(policy, dtype="mixed", cache_dtype="fp8")
    else:
        engines["float32"] = Engine(policy, dtype="float32")
        engines["torch"] = Engine(policy, dtype="mixed", backend="eager")
    sampling = Sampling(guidance_scale=guidance_scale)
    forms = {name: engine_form(e, prompts, group_size, sampling) for name, e in engines.items()}
    forms["generate"] = lambda: generate(baseline, images, guidance_scale=guidance_scale)
    seconds = interleaved(forms, rounds, timer=timer)
    stats = RolloutStats.of(engines["mixed"].passes)
    moved = {n: rollout_bytes(DecoderSize.of(e.decoder), stats) / 1e9 for n, e in engines.items()}
    extra = {"copy_gb_per_s": copy_bytes_per_s(policy.device, timer) / 1e9}
    if "float32" in engines:
        greedy = Sampling(guidance_scale=guidance_scale, temperature=0)
        ours = engine_form(engines["float32"], prompts, 1, greedy)()
        theirs = generate(baseline, prompts, guidance_scale=guidance_scale, greedy=True)
        extra["greedy_equal"] = (ours == theirs).float().mean().item()
    for engine in engines.values():
        engine.release()
    seconds["growing"] = grow_seconds(
        baseline, images, guidance_scale=guidance_scale, rounds=rounds, timer=timer
    )
    rows: dict[str, dict[str, float]] = {}
    for name, value in seconds.items():
        rows[name] = {
            "s": value,
            "ms_per_token": value / stats.num_tokens * 1e3,
            "images_per_s": len(images) / value,
        }
        if name in engines:
            rows[name] |= {
                "gb": moved[name],
                "gb_per_s": moved[name] / value,
                "byte_limit_share": moved[name] / value / extra["copy_gb_per_s"],
                "speedup": seconds["generate"] / value,
                "speedup_over_growing": seconds["growing"] / value,
            }
    return _result(model, rows, len(images), extra)


def engine_form(
    engine: Engine, prompts: list[Prompt], group_size: int, sampling: Sampling
) -> Callable[[], Tensor]:
    """A call that samples a group for each prompt, always the same; tokens_NT."""
    policy = engine.policy
    uniforms_NT = image_uniforms(
        seed=0,
        step=0,
        prompt_indices=[prompt.index for prompt in prompts],
        group_size=group_size,
        num_tokens=policy.layout.num_tokens,
    )

    @torch.no_grad()
    def sample() -> Tensor:
        engine.passes.clear()
        generated = engine.generate(
            policy.encode(prompts),
            group_size=group_size,
            sampling=sampling,
            uniforms_NT=uniforms_NT,
        )
        return generated.tokens_NT

    return sample


def with_plain_layers(policy: Policy) -> Policy:
    """The policy with transformers' own attention and norms in place of ours."""
    policy.module.set_attn_implementation("sdpa")
    for block in policy.trunk_blocks:
        for name in INPUT_NORMS:
            ours = getattr(block, name)
            plain = LlamaRMSNorm(len(ours.weight), ours.variance_epsilon)
            plain.weight = ours.weight
            setattr(block, name, plain)
    return policy


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    guidance_scale: float,
    greedy: bool = False,
) -> Tensor:
    """An image of each prompt by transformers' own generate, tokens_NT; its top_k = 50 is off."""
    ids_NL, mask_NL = padded_ids(policy, prompts)
    return policy.module.generate(
        input_ids=ids_NL,
        attention_mask=mask_NL,
        generation_mode="image",
        do_sample=not greedy,
        guidance_scale=guidance_scale,
        **({} if greedy else {"top_k": 0}),
    )


def padded_ids(policy: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Ids of the prompts, left-padded, and their attention mask, NL."""
    rows = [policy.prompt_ids(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    # What stands in a masked position plays no part; 0 is an id of every vocabulary.
    ids_NL = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_NL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids_NL.to(policy.device), mask_NL.to(policy.device)


@torch.no_grad()
def grow_seconds(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    guidance_scale: float,
    rounds: int,
    timer: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a loop whose cache is reallocated at every token, as in released training code.

    A whole image would take minutes: windows of tokens over a cache of random keys and values are
    timed from the first token to the last, and the time of a token integrated over all positions.
    """
    num_tokens = policy.layout.num_tokens
    window = min(WINDOW, num_tokens)
    starts = np.unique(np.linspace(0, num_tokens - window, NUM_WINDOWS).round().astype(int))
    prefix = policy.encode(prompts)
    num_rows, num_positions, width = prefix.embeds_PLD.shape
    inputs_R1D = prefix.embeds_PLD[:, -1:].repeat(2, 1, 1)
    config = policy.module.config.text_config
    head_dim = width // config.num_attention_heads
    seconds = []
    for start in starts.tolist():
        shape = (2 * num_rows, config.num_key_value_heads, num_positions + start, head_dim)
        runs = []
        for _ in range(rounds + 1):
            cache = DynamicCache()
            for layer in range(config.num_hidden_layers):
                keys, values = (inputs_R1D.new_empty(shape).normal_() for _ in range(2))
                cache.update(keys, values, layer)
            draw = partial(_grow, policy, cache, inputs_R1D, window, guidance_scale=guidance_scale)
            runs.append(seconds_of(draw, timer=timer))
        # The first warms up.
        seconds.append(statistics.median(runs[1:]) / window)
    middles = starts + (window - 1) / 2
    return float(np.interp(np.arange(num_tokens), middles, seconds).sum())


def _grow(
    policy: Policy,
    cache: DynamicCache,
    inputs_RLD: Tensor,
    num_tokens: int,
    *,
    guidance_scale: float,
) -> Tensor:
    """Draws tokens behind the inputs and what the cache holds; tokens_NT."""
    tokens = []
    for _ in range(num_tokens):
        states = policy.module.model.language_model(
            inputs_embeds=inputs_RLD, past_key_values=cache, use_cache=True
        )
        cond, uncond = policy.head(states.last_hidden_state[:, -1]).float().chunk(2)
        probs = (uncond + guidance_scale * (cond - uncond)).softmax(-1)
        tokens.append(torch.multinomial(probs, 1))
        inputs_RLD = policy.embed(tokens[-1]).repeat(2, 1, 1)
    return torch.cat(tokens, 1)


def _result(
    model: str, rows: dict[str, dict[str, float]], num_images: int, extra: dict[str, float]
) -> BenchResult:
    measures = flat(rows) | extra
    mixed = rows["mixed"]
    headline = f"{mixed['speedup']:.1f}x generate with bf16 linear layers, "
    if "float32" in rows:
        headline += f"{rows['float32']['speedup']:.1f}x in fp32, "
        headline += f"greedy tokens {measures['greedy_equal']:.0%} equal"
    else:
        headline += f"{mixed['speedup_over_growing']:.1f}x a growing cache, "
        headline += f"{mixed['byte_limit_share']:.0%} of the byte limit, {mixed['s']:.1f} s"
    rate = measures["copy_gb_per_s"]
    limit = f"limit: {mixed['gb']:.1f} GB (mixed) at {rate:.1f} GB/s, what a copy moves: "
    limit += f"{mixed['gb'] / rate:.2f} s"
    lines = (*table(rows, FORMATS), limit)
    return BenchResult(headline, _reached(model, num_images, measures), measures, lines)


def _reached(model: str, num_images: int, measures: dict[str, float]) -> bool | None:
    bounds = MIN_ON_H200.get(model) if on_h200() else None
    if model == "shapes" and not torch.cuda.is_available():
        bounds = MIN_ON_CPU
    if bounds is None or num_images != 64:
        return None
    return all(measures[name] >= value for name, value in bounds.items())
