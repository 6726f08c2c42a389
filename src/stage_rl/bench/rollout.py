"""`stage bench rollout`: the engine against transformers' own generate, on the same weights.

Shape suffixes: P prompts, N images, L prompt slots, T image tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stage_rl.bench.base import (
    BenchResult,
    Work,
    at_least,
    check_guided,
    copy_bytes_per_s,
    interleaved,
    seconds_of,
)
from stage_rl.bench.models import LONG_TEXT, SIZES, TEXT, bench_device, policy_of
from stage_rl.policies.janus import JanusPolicy
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.types import Prompt

BAR = (
    ">= 2x generate with bf16 linear layers, >= 1.2x in fp32 with identical greedy tokens "
    "(CPU, shapes model, 64 images); one H200: janus-7b <= 6.2 s, >= 70% of the byte limit, >= 3x "
    "generate, >= 8x the growing cache; janus-1b >= 60% of the byte limit"
)

LEAST_SPEEDUP = {"mixed": 2.0, "float32": 1.2}

LEAST_ON_H200 = {
    "janus-7b": {
        "mixed_byte_limit_share": 0.7,
        "speedup_mixed": 3.0,
        "speedup_mixed_over_growing": 8.0,
    },
    "janus-1b": {"mixed_byte_limit_share": 0.6},
}

MOST_SECONDS_7B = 6.2


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
    settings = dict(locals())
    at_least(1, num_prompts=num_prompts, group_size=group_size, rounds=rounds)
    check_guided(guidance_scale)
    policy = policy_of(model, bench_device())
    text = LONG_TEXT if model in SIZES else TEXT
    case = Case(policy, [Prompt(text, i) for i in range(num_prompts)], group_size, guidance_scale)
    timer = time.process_time if processor_time else time.perf_counter
    measures = measure(case, rounds, sized=model in SIZES, timer=timer)
    return BenchResult(
        name="rollout",
        headline=_headline(measures),
        bar=BAR,
        reached=_reached(model, case, measures),
        settings=settings,
        measures=measures,
        table=_table(measures),
    )


@dataclass(frozen=True)
class Case:
    """What is sampled."""

    policy: JanusPolicy
    prompts: list[Prompt]
    group_size: int
    guidance_scale: float

    @property
    def num_images(self) -> int:
        """Images of one call."""
        return len(self.prompts) * self.group_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.policy.layout.num_tokens

    @property
    def ids_NL(self) -> Tensor:
        """The prompts' ids, each once for every image."""
        ids_PL = torch.tensor([self.policy.prompt_ids(prompt) for prompt in self.prompts])
        return ids_PL.repeat_interleave(self.group_size, 0)


def measure(
    case: Case, rounds: int, *, sized: bool, timer: Callable[[], float]
) -> dict[str, float]:
    """All figures of the benchmark; `sized`: the model is too large for what compares in full."""
    policy, scale = case.policy, case.guidance_scale
    baseline = _with_sdpa(policy)
    sampling = Sampling(guidance_scale=scale)
    engines = {d: Engine(policy, dtype=d) for d in (("mixed",) if sized else LEAST_SPEEDUP)}
    forms: dict[str, Callable[[], Tensor]] = {
        dtype: engine_form(engine, case.prompts, group_size=case.group_size, sampling=sampling)
        for dtype, engine in engines.items()
    }
    forms["generate"] = lambda: generate(baseline, case.ids_NL, guidance_scale=scale)
    grown = [prompt for prompt in case.prompts for _ in range(case.group_size)]
    if not sized:
        forms["growing"] = lambda: grow(baseline, grown, guidance_scale=scale)
    seconds = interleaved(forms, rounds, timer=timer)
    if sized:
        for engine in engines.values():
            engine.release()
        seconds["growing"] = grow_seconds(baseline, grown, guidance_scale=scale, rounds=rounds)
    measures = _measures(seconds, case)
    rate = copy_bytes_per_s(policy.device, timer)
    measures |= _against_the_limit(seconds, engines, case, rate=rate)
    if not sized:
        measures["greedy_equal"] = _greedy_agreement(
            engines["float32"], baseline, case.prompts, guidance_scale=scale
        )
    return measures


def _with_sdpa(policy: JanusPolicy) -> JanusPolicy:
    """The policy with transformers' own attention in place of ours."""
    baseline = policy.reference()
    assert isinstance(baseline, JanusPolicy)
    module: Any = baseline.module
    module.set_attn_implementation("sdpa")
    return baseline


def generate(
    policy: JanusPolicy,
    ids_NL: Tensor,
    *,
    guidance_scale: float,
    mask_NL: Tensor | None = None,
    greedy: bool = False,
) -> Tensor:
    """Image tokens by transformers' own generate, tokens_NT; its default of top_k = 50 is off.

    `mask_NL` is 0 at the left pads of prompts of different length.
    """
    ids_NL = ids_NL.to(policy.device)
    module: Any = policy.module
    return module.generate(
        input_ids=ids_NL,
        attention_mask=torch.ones_like(ids_NL) if mask_NL is None else mask_NL,
        generation_mode="image",
        do_sample=not greedy,
        guidance_scale=guidance_scale,
        **({} if greedy else {"top_k": 0}),
    )


def engine_form(
    engine: Engine, prompts: list[Prompt], *, group_size: int, sampling: Sampling
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
        prefix = policy.encode(prompts)
        return engine.generate(
            prefix, group_size=group_size, sampling=sampling, uniforms_NT=uniforms_NT
        ).tokens_NT

    return sample


def _greedy_agreement(
    engine: Engine, baseline: JanusPolicy, prompts: list[Prompt], *, guidance_scale: float
) -> float:
    """Share of equal tokens at temperature 0, one image for each prompt."""
    ids_PL = torch.tensor([baseline.prompt_ids(prompt) for prompt in prompts])
    theirs = generate(baseline, ids_PL, guidance_scale=guidance_scale, greedy=True)
    sampling = Sampling(guidance_scale=guidance_scale, temperature=0)
    ours = engine_form(engine, prompts, group_size=1, sampling=sampling)()
    return (ours == theirs).float().mean().item()


def _measures(seconds: dict[str, float], case: Case) -> dict[str, float]:
    measures: dict[str, float] = {}
    for name, value in seconds.items():
        measures[f"{name}_s"] = value
        measures[f"{name}_ms_per_token"] = value / case.num_tokens * 1e3
        measures[f"{name}_images_per_s"] = case.num_images / value
    for dtype in LEAST_SPEEDUP.keys() & seconds.keys():
        measures[f"speedup_{dtype}"] = seconds["generate"] / seconds[dtype]
        measures[f"speedup_{dtype}_over_growing"] = seconds["growing"] / seconds[dtype]
    return measures


def _against_the_limit(
    seconds: dict[str, float], engines: dict[str, Engine], case: Case, *, rate: float
) -> dict[str, float]:
    """Bytes a second of each engine, beside the `rate` of a copy."""
    work = Work(case.num_images, case.ids_NL.shape[1], case.num_tokens, case.guidance_scale != 1)
    measures = {"copy_gb_per_s": rate / 1e9}
    for name, engine in engines.items():
        moved = work.rollout_bytes(engine.decoder)
        measures[f"{name}_gb"] = moved / 1e9
        measures[f"{name}_gb_per_s"] = moved / seconds[name] / 1e9
        measures[f"{name}_byte_limit_share"] = moved / seconds[name] / rate
    return measures


def _headline(measures: dict[str, float]) -> str:
    text = f"{measures['speedup_mixed']:.1f}x generate with bf16 linear layers, "
    if "greedy_equal" not in measures:
        growing, share = (
            measures[name] for name in ("speedup_mixed_over_growing", "mixed_byte_limit_share")
        )
        return (
            f"{text}{growing:.1f}x a growing cache, {share:.0%} of the byte limit, "
            f"{measures['mixed_s']:.1f} s"
        )
    return (
        f"{text}{measures['speedup_float32']:.1f}x in fp32, "
        f"greedy tokens {measures['greedy_equal']:.0%} equal"
    )


def _reached(model: str, case: Case, measures: dict[str, float]) -> bool | None:
    if case.num_images != 64:
        return None
    if model == "shapes" and case.policy.device.type == "cpu":
        fast = all(measures[f"speedup_{dtype}"] >= x for dtype, x in LEAST_SPEEDUP.items())
        return fast and measures["greedy_equal"] == 1
    on_gpu = case.policy.device.type == "cuda"
    if model in LEAST_ON_H200 and on_gpu and "H200" in torch.cuda.get_device_name():
        fast = all(measures[name] >= x for name, x in LEAST_ON_H200[model].items())
        return fast and (model != "janus-7b" or measures["mixed_s"] <= MOST_SECONDS_7B)
    return None


def _table(measures: dict[str, float]) -> tuple[str, ...]:
    lines = [
        f"{'form':<10}{'seconds':>9}{'ms/token':>10}{'images/s':>10}{'GB/s':>8}{'of limit':>10}"
    ]
    for name in ("mixed", "float32", "generate", "growing"):
        if f"{name}_s" not in measures:
            continue
        line = (
            f"{name:<10}{measures[f'{name}_s']:>9.2f}{measures[f'{name}_ms_per_token']:>10.2f}"
            f"{measures[f'{name}_images_per_s']:>10.2f}"
        )
        if f"{name}_gb" in measures:
            share = measures[f"{name}_byte_limit_share"]
            line += f"{measures[f'{name}_gb_per_s']:>8.1f}{share:>10.0%}"
        lines.append(line)
    rate, moved = measures["copy_gb_per_s"], measures["mixed_gb"]
    limit = f"limit: {moved:.1f} GB (mixed) at {rate:.1f} GB/s, what a copy moves: "
    return (*lines, f"{limit}{moved / rate:.2f} s")


# A sampling loop whose cache grows with every token, the structure of released training code.
#
# Where a whole image takes minutes, windows of some tokens are timed at several positions and the
# time per token is integrated over all positions.
#
# Shape suffixes: N images, R rows (N conditional, then N unconditional), L prompt slots, T image
# tokens, K key-value heads, S slots, E head dimension.


WINDOW = 16
"""Tokens of a window."""

NUM_WINDOWS = 5


@torch.no_grad()
def grow(policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float) -> Tensor:
    """Image tokens by a loop whose cache is reallocated at every token, tokens_NT."""
    prefix = policy.encode(prompts)
    inputs = torch.cat([prefix.embeds_PLD, prefix.unconditional().embeds_PLD])
    num_tokens = policy.layout.num_tokens
    return _go_on(policy, DynamicCache(), inputs, num_tokens, guidance_scale=guidance_scale)


def grow_seconds(
    policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float, rounds: int
) -> float:
    """Seconds that `grow` would take, from windows over a cache of random keys and values."""
    num_tokens = policy.layout.num_tokens
    starts = window_starts(num_tokens)
    window = min(WINDOW, num_tokens)
    seconds = []
    for start in starts:
        runs = [
            _window_seconds(policy, prompts, start, window, guidance_scale=guidance_scale)
            for _ in range(rounds + 1)
        ]
        # The first warms up.
        seconds.append(statistics.median(runs[1:]) / window)
    return integrate([start + (window - 1) / 2 for start in starts], seconds, num_tokens)


def window_starts(num_tokens: int) -> list[int]:
    """First tokens of the windows, from the first token of the image to its last."""
    last = max(num_tokens - WINDOW, 0)
    return sorted({round(last * k / (NUM_WINDOWS - 1)) for k in range(NUM_WINDOWS)})


def integrate(positions: Sequence[float], seconds: Sequence[float], num_tokens: int) -> float:
    """Sum over all tokens of the seconds that the windows around `positions` took for one.

    Straight lines between them, constant beyond the first and last.
    """
    return float(np.interp(np.arange(num_tokens), positions, seconds).sum())


@torch.no_grad()
def _window_seconds(
    policy: JanusPolicy,
    prompts: Sequence[Prompt],
    start: int,
    window: int,
    *,
    guidance_scale: float,
) -> float:
    prefix = policy.encode(prompts)
    config: Any = policy.module.config.text_config
    num_rows, num_slots, width = prefix.embeds_PLD.shape
    heads = config.num_key_value_heads
    head_dim = width // config.num_attention_heads
    shape = (2 * num_rows, heads, num_slots + start, head_dim)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys, values = (prefix.embeds_PLD.new_empty(shape).normal_() for _ in range(2))
        cache.update(keys, values, layer)
    inputs = prefix.embeds_PLD[:, -1:].repeat(2, 1, 1)
    return seconds_of(lambda: _go_on(policy, cache, inputs, window, guidance_scale=guidance_scale))


def _go_on(
    policy: JanusPolicy,
    cache: DynamicCache,
    inputs: Tensor,
    num_tokens: int,
    *,
    guidance_scale: float,
) -> Tensor:
    """Draws tokens behind the inputs, RLD, and what the cache holds; tokens_NT."""
    trunk: Any = policy.module.model.language_model
    tokens = []
    for _ in range(num_tokens):
        states = trunk(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        cond, uncond = policy.head(states.last_hidden_state[:, -1]).float().chunk(2)
        probs = (uncond + guidance_scale * (cond - uncond)).softmax(-1)
        tokens.append(torch.multinomial(probs, 1))
        inputs = policy.embed(tokens[-1]).repeat(2, 1, 1)
    return torch.cat(tokens, 1)
