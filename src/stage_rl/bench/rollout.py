"""`stage bench rollout`: the engine against transformers' own generate, on the same weights.

Shape suffixes: P prompts, N images, R rows (N conditional, then N unconditional), L prompt slots,
T image tokens, D width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stage_rl.bench.base import (
    BenchResult,
    benchmark,
    check_guided,
    columns,
    copy_bytes_per_s,
    interleaved,
    on_h200,
    seconds_of,
)
from stage_rl.bench.models import SIZES, policy_of, prompts_of
from stage_rl.distributed import pick_device
from stage_rl.policies.janus import JanusPolicy
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.training.metrics import DecoderSize, RolloutStats, rollout_bytes
from stage_rl.types import Prompt

BAR = (
    ">= 2x generate with bf16 linear layers, >= 1.2x in fp32 with identical greedy tokens "
    "(CPU, shapes model, 64 images); one H200: janus-7b <= 6.2 s, >= 70% of the byte limit, >= 3x "
    "generate, >= 8x the growing cache; janus-1b >= 60% of the byte limit"
)
LEAST_ON_CPU = {"speedup_mixed": 2.0, "speedup_float32": 1.2, "greedy_equal": 1.0}
LEAST_ON_H200 = {
    "janus-7b": {
        "mixed_images_per_s": 64 / 6.2,
        "mixed_byte_limit_share": 0.7,
        "speedup_mixed": 3.0,
        "speedup_mixed_over_growing": 8.0,
    },
    "janus-1b": {"mixed_byte_limit_share": 0.6},
}
WINDOW = 16
"""Tokens of a window of the growing cache, where a whole image would take minutes."""
NUM_WINDOWS = 5


@benchmark(BAR)
def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 5.0,
    rounds: int = 3,
    processor_time: bool = False,
) -> BenchResult:
    """Samples the same number of images in several ways, in turn.

    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights in
    bf16. The ways: the engine in both precisions (a size: mixed alone), generate, and a loop over a
    cache that grows with every token (a size: from windows of tokens). `processor_time` counts what
    the processors of this process worked, for a CPU that others use too.
    """
    check_guided(guidance_scale)
    timer = time.process_time if processor_time else time.perf_counter
    sized = model in SIZES
    policy, prompts = policy_of(model, pick_device("auto")), prompts_of(model, num_prompts)
    images = [prompt for prompt in prompts for _ in range(group_size)]
    baseline = with_plain_attention(policy.reference())
    engines = {d: Engine(policy, dtype=d) for d in (("mixed",) if sized else ("mixed", "float32"))}
    sampling = Sampling(guidance_scale=guidance_scale)
    forms = {name: engine_form(e, prompts, group_size, sampling) for name, e in engines.items()}
    forms["generate"] = lambda: generate(baseline, images, guidance_scale=guidance_scale)
    if not sized:
        forms["growing"] = lambda: grow(baseline, images, guidance_scale=guidance_scale)
    seconds = interleaved(forms, rounds, timer=timer)
    stats = RolloutStats.of(engines["mixed"].passes)
    if sized:
        engines["mixed"].release()
        seconds["growing"] = grow_seconds(
            baseline, images, guidance_scale=guidance_scale, rounds=rounds
        )
    measures = _measures(seconds, len(images), stats.num_tokens)
    measures["copy_gb_per_s"] = copy_bytes_per_s(policy.device, timer) / 1e9
    for name, engine in engines.items():
        moved = rollout_bytes(DecoderSize.of(engine.decoder), stats) / 1e9
        rate = moved / seconds[name]
        share = rate / measures["copy_gb_per_s"]
        measures |= {
            f"{name}_gb": moved,
            f"{name}_gb_per_s": rate,
            f"{name}_byte_limit_share": share,
        }
    if not sized:
        greedy = Sampling(guidance_scale=guidance_scale, temperature=0)
        ours = engine_form(engines["float32"], prompts, 1, greedy)()
        theirs = generate(baseline, prompts, guidance_scale=guidance_scale, greedy=True)
        measures["greedy_equal"] = (ours == theirs).float().mean().item()
    return BenchResult(
        _headline(measures), _reached(model, len(images), measures), measures, _table(measures)
    )


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


def with_plain_attention(policy: Any) -> JanusPolicy:
    """The policy with transformers' own attention in place of ours."""
    policy.module.set_attn_implementation("sdpa")
    return policy


def generate(
    policy: JanusPolicy,
    prompts: Sequence[Prompt],
    *,
    guidance_scale: float,
    greedy: bool = False,
) -> Tensor:
    """An image of each prompt by transformers' own generate, tokens_NT; its top_k = 50 is off."""
    module: Any = policy.module
    ids_NL, mask_NL = padded_ids(policy, prompts)
    return module.generate(
        input_ids=ids_NL,
        attention_mask=mask_NL,
        generation_mode="image",
        do_sample=not greedy,
        guidance_scale=guidance_scale,
        **({} if greedy else {"top_k": 0}),
    )


def padded_ids(policy: JanusPolicy, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Ids of the prompts, left-padded, and their attention mask, NL."""
    rows = [policy.prompt_ids(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    # What stands in a masked slot plays no part; 0 is an id of every vocabulary.
    ids_NL = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask_NL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids_NL.to(policy.device), mask_NL.to(policy.device)


@torch.no_grad()
def grow(policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float) -> Tensor:
    """Image tokens by a loop whose cache is reallocated at every token, tokens_NT.

    That is the structure of released training code.
    """
    prefix = policy.encode(prompts)
    inputs = torch.cat([prefix.embeds_PLD, prefix.unconditional().embeds_PLD])
    num_tokens = policy.layout.num_tokens
    return _go_on(policy, DynamicCache(), inputs, num_tokens, guidance_scale=guidance_scale)


@torch.no_grad()
def grow_seconds(
    policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float, rounds: int
) -> float:
    """Seconds that `grow` would take: windows of tokens over a cache of random keys and values are
    timed from the first token to the last, and the time of a token integrated over all positions.
    """
    num_tokens = policy.layout.num_tokens
    window = min(WINDOW, num_tokens)
    starts = np.unique(np.linspace(0, num_tokens - window, NUM_WINDOWS).round().astype(int))
    prefix = policy.encode(prompts)
    num_rows, num_slots, width = prefix.embeds_PLD.shape
    inputs_R1D = prefix.embeds_PLD[:, -1:].repeat(2, 1, 1)
    module: Any = policy.module
    config = module.config.text_config
    head_dim = width // config.num_attention_heads
    seconds = []
    for start in starts.tolist():
        shape = (2 * num_rows, config.num_key_value_heads, num_slots + start, head_dim)
        runs = []
        for _ in range(rounds + 1):
            cache = DynamicCache()
            for layer in range(config.num_hidden_layers):
                keys, values = (inputs_R1D.new_empty(shape).normal_() for _ in range(2))
                cache.update(keys, values, layer)
            runs.append(
                seconds_of(
                    lambda cache=cache: _go_on(
                        policy, cache, inputs_R1D, window, guidance_scale=guidance_scale
                    )
                )
            )
        # The first warms up.
        seconds.append(statistics.median(runs[1:]) / window)
    middles = starts + (window - 1) / 2
    return float(np.interp(np.arange(num_tokens), middles, seconds).sum())


def _go_on(
    policy: JanusPolicy,
    cache: DynamicCache,
    inputs_RLD: Tensor,
    num_tokens: int,
    *,
    guidance_scale: float,
) -> Tensor:
    """Draws tokens behind the inputs and what the cache holds; tokens_NT."""
    module: Any = policy.module
    trunk = module.model.language_model
    tokens = []
    for _ in range(num_tokens):
        states = trunk(inputs_embeds=inputs_RLD, past_key_values=cache, use_cache=True)
        cond, uncond = policy.head(states.last_hidden_state[:, -1]).float().chunk(2)
        probs = (uncond + guidance_scale * (cond - uncond)).softmax(-1)
        tokens.append(torch.multinomial(probs, 1))
        inputs_RLD = policy.embed(tokens[-1]).repeat(2, 1, 1)
    return torch.cat(tokens, 1)


def _measures(seconds: dict[str, float], num_images: int, num_tokens: int) -> dict[str, float]:
    measures: dict[str, float] = {}
    for name, value in seconds.items():
        measures[f"{name}_s"] = value
        measures[f"{name}_ms_per_token"] = value / num_tokens * 1e3
        measures[f"{name}_images_per_s"] = num_images / value
        if name in ("mixed", "float32"):
            measures[f"speedup_{name}"] = seconds["generate"] / value
            measures[f"speedup_{name}_over_growing"] = seconds["growing"] / value
    return measures


def _headline(measures: dict[str, float]) -> str:
    text = f"{measures['speedup_mixed']:.1f}x generate with bf16 linear layers, "
    if "greedy_equal" in measures:
        equal = f"greedy tokens {measures['greedy_equal']:.0%} equal"
        return f"{text}{measures['speedup_float32']:.1f}x in fp32, {equal}"
    share = f"{measures['mixed_byte_limit_share']:.0%} of the byte limit"
    growing = f"{measures['speedup_mixed_over_growing']:.1f}x a growing cache"
    return f"{text}{growing}, {share}, {measures['mixed_s']:.1f} s"


def _reached(model: str, num_images: int, measures: dict[str, float]) -> bool | None:
    least = LEAST_ON_H200.get(model) if on_h200() else None
    if model == "shapes" and not torch.cuda.is_available():
        least = LEAST_ON_CPU
    if least is None or num_images != 64:
        return None
    return all(measures[name] >= value for name, value in least.items())


def _table(measures: dict[str, float]) -> tuple[str, ...]:
    rows: list[tuple[str, ...]] = [("form", "seconds", "ms/token", "images/s", "GB/s", "of limit")]
    for name in ("mixed", "float32", "generate", "growing"):
        if f"{name}_s" in measures:
            times = (measures[f"{name}_{unit}"] for unit in ("s", "ms_per_token", "images_per_s"))
            rate, share = "", ""
            if f"{name}_gb" in measures:
                rate = f"{measures[f'{name}_gb_per_s']:.1f}"
                share = f"{measures[f'{name}_byte_limit_share']:.0%}"
            rows.append((name, *(f"{x:.2f}" for x in times), rate, share))
    rate, moved = measures["copy_gb_per_s"], measures["mixed_gb"]
    limit = f"limit: {moved:.1f} GB (mixed) at {rate:.1f} GB/s, what a copy moves: "
    return (*columns(*rows), f"{limit}{moved / rate:.2f} s")
