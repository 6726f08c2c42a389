"""The rollout engine: samples image tokens with its own copies of a policy's weights.

Shape suffixes: P prompts, G group, N = P x G completions, R rows (N conditional, then with
guidance N unconditional), L prompt slots, T image tokens, D model width, V codebook size.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.policies.base import Policy, Prefix
from stage_rl.rollout.attention import KeyValueCache
from stage_rl.rollout.decoder import LINEAR_DTYPES, Decoder
from stage_rl.rollout.sampling import Sampling, conditional_statistics, draw, guide

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Any of these capabilities multiplies bf16 matrices at least as fast as fp32 ones."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """Image tokens, row i * G + k for image k of prompt i, and what the sampler knew of them."""

    tokens_NT: Tensor
    logprobs_NT: Tensor
    """Conditional, temperature 1 (nats)."""
    guided_logprobs_NT: Tensor
    """Under the distribution that was sampled from (nats)."""
    entropy_NT: Tensor
    """Of the conditional distribution, temperature 1 (nats)."""

    @classmethod
    def empty(cls, uniforms_NT: Tensor) -> Generated:
        """Buffers of the shape and place of the uniform numbers."""
        logprobs, guided, entropy = (torch.empty_like(uniforms_NT) for _ in range(3))
        return cls(torch.empty_like(uniforms_NT, dtype=torch.long), logprobs, guided, entropy)


class Engine:
    """Samples groups of images from a policy.

    `dtype` is `float32`, or `mixed` for bf16 linear layers. The weights are those of the last
    `reload`; buffers keep their addresses.
    """

    def __init__(self, policy: Policy, *, dtype: str = "float32", max_images: int = 64):
        if dtype not in LINEAR_DTYPES:
            raise InputError(f"dtype: unknown '{dtype}'; write one of: {', '.join(LINEAR_DTYPES)}")
        if dtype == "mixed" and policy.device.type == "cpu":
            _warn_of_slow_bf16()
        self.policy = policy
        self.max_images = max_images
        """Images of one pass; it bounds the memory of the cache."""
        self.decoder = Decoder(policy.decoder_weights(), dtype=dtype)
        self._cache: KeyValueCache | None = None

    def reload(self) -> None:
        """Copies the policy's weights as they are now, in place; call it once per step."""
        self.decoder.load(self.policy.decoder_weights())

    @torch.no_grad()
    def generate(
        self, prefix: Prefix, *, group_size: int, sampling: Sampling, uniforms_NT: Tensor
    ) -> Generated:
        """Samples `group_size` images for each prompt, one uniform number per token.

        Each row has its own length and positions: a batch gives what each prompt gives alone.
        """
        embeds_BLD, lengths_B = _rows_of(prefix, sampling)
        uniforms_NT = uniforms_NT.to(embeds_BLD.device)
        num_tokens = uniforms_NT.shape[1]
        num_slots = embeds_BLD.shape[1] + num_tokens - 1
        cache = self._cache_for(len(embeds_BLD) * group_size, num_slots)
        states_BD = self.decoder.prefill(embeds_BLD, lengths_B, cache, group_size=group_size)
        logits_RV = self.decoder.logits(states_BD).repeat_interleave(group_size, 0)
        positions_R = lengths_B.repeat_interleave(group_size)
        longest = int(lengths_B.max())
        generated = Generated.empty(uniforms_NT)
        for t in range(num_tokens):
            tokens_N = _sample_into(generated, t, logits_RV, uniforms_NT, sampling)
            if t == num_tokens - 1:
                break
            embeds_ND = self.decoder.token_embeds_VD[tokens_N]
            states_RD = self.decoder.step(
                embeds_ND.repeat(len(positions_R) // len(tokens_N), 1),
                positions_R,
                cache,
                num_live=longest + t + 1,
            )
            logits_RV = self.decoder.logits(states_RD)
            positions_R += 1
        return generated

    def _cache_for(self, num_rows: int, num_slots: int) -> KeyValueCache:
        """The cache of the last call where it fits."""
        if self._cache is None or not self._cache.fits(num_rows, num_slots):
            self._cache = None
            self._cache = self.decoder.new_cache(num_rows, num_slots)
        return self._cache


@functools.cache
def _warn_of_slow_bf16() -> None:
    """Warns once where torch knows the processor and it has no bf16 arithmetic."""
    # Not every torch that the package allows has it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities and not any(capabilities.get(name) for name in FAST_BF16):
        log.warning(
            "this CPU has no bf16 arithmetic (AVX512-BF16, AMX), so mixed precision is slow; write "
            "rollout.dtype=float32 training.dtype=float32, or --dtype float32"
        )


def _rows_of(prefix: Prefix, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Embeddings and lengths of the prefill: conditional, then with guidance unconditional rows."""
    if not sampling.guided:
        return prefix.embeds_PLD, prefix.lengths_P
    if prefix.uncond_embeds_PLD is None:
        raise InputError("guidance_scale: this policy has no unconditional rows; write 1")
    embeds = torch.cat([prefix.embeds_PLD, prefix.uncond_embeds_PLD])
    return embeds, prefix.lengths_P.repeat(2)


def _sample_into(
    generated: Generated, t: int, logits_RV: Tensor, uniforms_NT: Tensor, sampling: Sampling
) -> Tensor:
    """Draws token t of every image and records what is known of it; tokens_N."""
    num_images = len(uniforms_NT)
    cond_NV = logits_RV[:num_images]
    uncond_NV = logits_RV[num_images:] if sampling.guided else None
    guided_NV = guide(cond_NV, uncond_NV, sampling.guidance_scale)
    tokens_N, guided_logprobs_N = draw(guided_NV, uniforms_NT[:, t], sampling)
    logprobs_N, entropy_N = conditional_statistics(cond_NV, tokens_N)
    generated.tokens_NT[:, t] = tokens_N
    generated.logprobs_NT[:, t] = logprobs_N
    generated.guided_logprobs_NT[:, t] = guided_logprobs_N
    generated.entropy_NT[:, t] = entropy_N
    return tokens_N
