"""A sampling loop whose cache grows with every token, the structure of released training code.

Where a whole image takes minutes, windows of some tokens are timed at several positions and the
time per token is integrated over all positions.

Shape suffixes: N images, R rows (N conditional, then N unconditional), L prompt slots, T image
tokens, K key-value heads, S slots, E head dimension.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from stage_rl.bench.base import seconds_of
from stage_rl.policies.janus import JanusPolicy
from stage_rl.types import Prompt

WINDOW = 16
"""Tokens of a window."""
NUM_WINDOWS = 5


@torch.no_grad()
def grow(policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float) -> Tensor:
    """Image tokens by a loop whose cache is reallocated at every token, tokens_NT."""
    prefix = policy.encode(prompts)
    assert prefix.uncond_embeds_PLD is not None
    inputs = torch.cat([prefix.embeds_PLD, prefix.uncond_embeds_PLD])
    num_tokens = policy.layout([]).num_tokens
    return _go_on(policy, DynamicCache(), inputs, num_tokens, guidance_scale=guidance_scale)


def grow_seconds(
    policy: JanusPolicy, prompts: Sequence[Prompt], *, guidance_scale: float, rounds: int
) -> float:
    """Seconds that `grow` would take, from windows over a cache of random keys and values."""
    num_tokens = policy.layout([]).num_tokens
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
