"""`stage bench rollout`: the engine against transformers' own generate, on the same weights.

Shape suffixes: P prompts, N images, R rows, L prompt slots, T image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stage_rl.bench.base import BenchResult, at_least, check_guided, interleaved
from stage_rl.policies.config import JanusConfig
from stage_rl.policies.janus import JanusPolicy
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling, image_uniforms
from stage_rl.types import Prompt

BAR = (
    ">= 2x generate with bf16 linear layers, >= 1.2x in fp32 with identical greedy tokens "
    "(CPU, shapes model, 64 images)"
)
LEAST_SPEEDUP = {"mixed": 2.0, "float32": 1.2}
TEXT = "a photo of a red square"


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 5.0,
    rounds: int = 3,
) -> BenchResult:
    """Samples the same number of images in four ways, in turn.

    `model` is a folder, a hub id, or `shapes`. The four: the engine in both precisions, generate,
    and a loop over a cache that grows with every token, the structure of released training code.
    """
    at_least(1, num_prompts=num_prompts, group_size=group_size, rounds=rounds)
    check_guided(guidance_scale)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = JanusConfig(path=model, trainable=()).build(device)
    baseline = policy.reference()
    baseline.module.set_attn_implementation("sdpa")
    prompts = [Prompt(TEXT, index) for index in range(num_prompts)]
    ids_NL = torch.tensor([policy.prompt_ids(p) for p in prompts]).repeat_interleave(group_size, 0)
    sampling = Sampling(guidance_scale=guidance_scale)
    engines = {dtype: Engine(policy, dtype=dtype) for dtype in LEAST_SPEEDUP}
    forms: dict[str, Callable[[], Tensor]] = {
        dtype: _engine_form(engine, prompts, group_size, sampling)
        for dtype, engine in engines.items()
    }
    forms["generate"] = lambda: generate(baseline, ids_NL, guidance_scale=guidance_scale)
    forms["growing"] = lambda: grow(baseline, ids_NL, guidance_scale=guidance_scale)
    seconds = interleaved(forms, rounds)
    equal = _greedy_agreement(engines["float32"], baseline, prompts, guidance_scale)
    measures = _measures(seconds, len(ids_NL), policy.layout(prompts).num_tokens)
    judged = model == "shapes" and len(ids_NL) == 64 and policy.device.type == "cpu"
    fast = all(measures[f"speedup_{dtype}"] >= x for dtype, x in LEAST_SPEEDUP.items())
    return BenchResult(
        name="rollout",
        headline=(
            f"{measures['speedup_mixed']:.1f}x generate with bf16 linear layers, "
            f"{measures['speedup_float32']:.1f}x in fp32, greedy tokens {equal:.0%} equal"
        ),
        bar=BAR,
        reached=(fast and equal == 1) if judged else None,
        settings={
            "model": model,
            "num_prompts": num_prompts,
            "group_size": group_size,
            "guidance_scale": guidance_scale,
            "rounds": rounds,
        },
        measures={**measures, "greedy_equal": equal},
    )


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


@torch.no_grad()
def grow(policy: JanusPolicy, ids_NL: Tensor, *, guidance_scale: float) -> Tensor:
    """Image tokens by a loop whose cache is reallocated at every token, tokens_NT."""
    prefix = policy.encode([Prompt(TEXT)]).repeat(len(ids_NL))
    assert prefix.uncond_embeds_PLD is not None
    inputs = torch.cat([prefix.embeds_PLD, prefix.uncond_embeds_PLD])
    trunk, cache, tokens = policy.module.model.language_model, DynamicCache(), []
    for _ in range(policy.layout([]).num_tokens):
        states = trunk(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
        cond, uncond = policy.head(states.last_hidden_state[:, -1]).chunk(2)
        probs = (uncond + guidance_scale * (cond - uncond)).softmax(-1)
        tokens.append(torch.multinomial(probs, 1))
        inputs = policy.embed(tokens[-1]).repeat(2, 1, 1)
    return torch.cat(tokens, 1)


def _engine_form(
    engine: Engine, prompts: list[Prompt], group_size: int, sampling: Sampling
) -> Callable[[], Tensor]:
    policy = engine.policy
    uniforms_NT = image_uniforms(
        seed=0,
        step=0,
        prompt_indices=[prompt.index for prompt in prompts],
        group_size=group_size,
        num_tokens=policy.layout(prompts).num_tokens,
    )

    @torch.no_grad()
    def sample() -> Tensor:
        prefix = policy.encode(prompts)
        return engine.generate(
            prefix, group_size=group_size, sampling=sampling, uniforms_NT=uniforms_NT
        ).tokens_NT

    return sample


def _greedy_agreement(
    engine: Engine, baseline: JanusPolicy, prompts: list[Prompt], guidance_scale: float
) -> float:
    """Share of equal tokens at temperature 0, one image for each prompt."""
    ids_PL = torch.tensor([baseline.prompt_ids(prompt) for prompt in prompts])
    theirs = generate(baseline, ids_PL, guidance_scale=guidance_scale, greedy=True)
    sampling = Sampling(guidance_scale=guidance_scale, temperature=0)
    ours = _engine_form(engine, prompts, 1, sampling)()
    return (ours == theirs).float().mean().item()


def _measures(seconds: dict[str, float], num_images: int, num_tokens: int) -> dict[str, float]:
    measures: dict[str, float] = {}
    for name, value in seconds.items():
        measures[f"{name}_ms_per_token"] = value / num_tokens * 1e3
        measures[f"{name}_images_per_s"] = num_images / value
    for dtype in LEAST_SPEEDUP:
        measures[f"speedup_{dtype}"] = seconds["generate"] / seconds[dtype]
        measures[f"speedup_{dtype}_over_growing"] = seconds["growing"] / seconds[dtype]
    return measures
