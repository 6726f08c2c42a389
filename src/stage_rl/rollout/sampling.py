"""From logits to tokens: guidance, temperature, top-k, top-p, and the draw from a uniform number.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.policies.logprobs import CONDITIONAL, Scoring, guide
from stage_rl.settings import MAX_GUIDANCE, MAX_TEMPERATURE, MIN_TEMPERATURE


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; a value out of range is an `InputError`."""

    guidance_scale: float = 1.0
    """Unconditional + scale x (conditional - unconditional); 1 needs no unconditional rows."""
    temperature: float = 1.0
    """Divides the guided logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together hold this share; 1: from all."""
    guided_entropy: bool = False
    """Also take the entropy of the guided distribution at temperature 1."""

    def __post_init__(self) -> None:
        for name, low, high, wanted in (
            ("guidance_scale", 0.0, MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE:g}"),
            ("temperature", 0.0, MAX_TEMPERATURE, f"a number from 0 to {MAX_TEMPERATURE:g}"),
            ("top_k", 0, math.inf, "a whole number of at least 0"),
            ("top_p", 1e-6, 1.0, "a share above 0, at most 1"),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise InputError(f"{name}: {value} is out of range; write {wanted}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            wanted = f"0, or at least {MIN_TEMPERATURE:g}"
            raise InputError(f"temperature: {self.temperature} is out of range; write {wanted}")

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are needed."""
        return self.guidance_scale != 1

    @property
    def whole(self) -> bool:
        """Whether any token of the codebook may be drawn."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p may leave tokens out."""
        return self.temperature > 0 and not self.whole

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is known of each token, by the fields of `Drawn` without their suffix."""
        names = ["logprobs", "guided_logprobs", "entropy"]
        names += ["guided_entropy"] if self.guided_entropy else []
        names += ["cut_mass", "cut_conditional_mass"] if self.truncated else []
        return tuple(names)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from all of the conditional distribution as it is."""
        return self.whole and self.temperature == 1 and not self.guided

    def scoring(self, logprobs: Literal["conditional", "guided", "guided_detached"]) -> Scoring:
        """How a recipe scores: guided forms what was sampled from, so that nothing can differ."""
        if logprobs == "conditional":
            return CONDITIONAL
        return Scoring(logprobs, self.guidance_scale, self.temperature)


def check_seed(seed: int) -> None:
    """An InputError for a seed that no stream can be keyed by."""
    if seed >= 2**63:
        raise InputError(f"seed: {seed} is out of range; write a number below 2**63")


def image_uniforms(
    *, seed: int, step: int, prompt_indices: Sequence[int], group_size: int, num_tokens: int
) -> Tensor:
    """The random stream of every image, uniforms_NT in [0, 1), fp32 on the CPU.

    Keyed by (seed, step, index of the prompt in its set, image k) alone: image k of a prompt has
    the same stream in any batch.
    """
    streams = [
        _stream(key=(seed, step), counter=(0, k, index, 0)).random(num_tokens, dtype=np.float32)
        for index in prompt_indices
        for k in range(group_size)
    ]
    return torch.from_numpy(np.stack(streams))


def _stream(*, key: tuple[int, int], counter: tuple[int, int, int, int]) -> np.random.Generator:
    # Philox counts up in its first word, so streams that differ in another word never meet.
    words = np.array(counter, dtype=np.uint64), np.array(key, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=words[0], key=words[1]))


@dataclass(frozen=True)
class Drawn:
    """A token of every image, and what the sampler knew of it (nats)."""

    tokens_N: Tensor
    logprobs_N: Tensor
    """Conditional, temperature 1."""
    guided_logprobs_N: Tensor
    """Under the distribution that the token was drawn from."""
    entropy_N: Tensor
    """Of the conditional distribution, temperature 1."""
    guided_entropy_N: Tensor | None
    """Of the guided distribution, temperature 1, where `Sampling.guided_entropy` asks."""
    cut_mass_N: Tensor | None = None
    """Probability of the tokens that top-k and top-p leave out, under guidance and temperature;
    where `Sampling.truncated` says that there may be such."""
    cut_conditional_mass_N: Tensor | None = None
    """That of the same tokens under the conditional distribution, temperature 1."""


def draw_tokens(logits_RV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Drawn:
    """Guidance, draw and statistics; of 2 N rows the second half is unconditional."""
    num_images = len(uniforms_N)
    cond_NV = guided_NV = logits_RV[:num_images]
    if sampling.guided:
        guided_NV = guide(cond_NV, logits_RV[num_images:], sampling.guidance_scale)
    cond_probs_NV = cond_NV.softmax(-1)
    probs_NV, cut = (cond_probs_NV if sampling.plain else None), ()
    if sampling.truncated:
        whole_NV = _tempered(guided_NV, sampling)
        kept_NV = _truncated(whole_NV, sampling)
        probs_NV = kept_NV.softmax(-1)
        cut = cut_masses(cond_probs_NV, whole_NV, kept_NV)
    tokens_N, guided_logprobs_N = draw(guided_NV, uniforms_N, sampling, probs_NV)
    logprobs_N, entropy_N = conditional_statistics(cond_NV, tokens_N, cond_probs_NV)
    guided_entropy_N = None
    if sampling.guided_entropy:
        guided_entropy_N = entropy(guided_NV) if sampling.guided else entropy_N
    return Drawn(tokens_N, logprobs_N, guided_logprobs_N, entropy_N, guided_entropy_N, *cut)


def cut_masses(cond_probs_NV: Tensor, whole_NV: Tensor, kept_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of the tokens that are left out (-inf in `kept_NV`), cut_mass_N, of logits
    that hold all of them, and their conditional one, cut_conditional_mass_N.
    """
    cut_mass_N = -torch.expm1(kept_NV.logsumexp(-1) - whole_NV.logsumexp(-1))
    return cut_mass_N.clamp_min(0), (cond_probs_NV * kept_NV.isneginf()).sum(-1)


def draw(
    guided_NV: Tensor, uniforms_N: Tensor, sampling: Sampling, probs_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """tokens_N and their log-probabilities (nats) under the distribution that they are drawn from.

    `probs_NV` are the probabilities that they are drawn by, where these are known. A token of
    probability 0 is never drawn, whatever the uniform number. At temperature 0 the likeliest token
    has probability 1. Where logits are not finite the log-probability is not either, and the token
    is any of the codebook.
    """
    if sampling.temperature == 0:
        # 0, and NaN where the likeliest logit is not finite.
        return guided_NV.argmax(-1), guided_NV.amax(-1) - guided_NV.amax(-1)
    if probs_NV is None:
        probs_NV = _truncated(_tempered(guided_NV, sampling), sampling).softmax(-1)
    tokens_N = invert_cdf(probs_NV, uniforms_N)
    return tokens_N, probs_NV.gather(1, tokens_N[:, None])[:, 0].log()


def invert_cdf(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """tokens_N: the first whose cumulative probability exceeds the uniform number."""
    # A GPU scans a single row in pieces whose order varies: its sums may fall and do not repeat.
    rows_NV = probs_NV if len(probs_NV) > 1 else probs_NV.repeat(2, 1)
    cdf_NV = rows_NV.cumsum(-1)[: len(probs_NV)]
    total_N = cdf_NV[:, -1]
    # Below the total even where rounding takes a uniform number next to 1 up to it. The first entry
    # above a threshold always rises over the one before, so its probability is not 0.
    below_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    threshold_N = torch.minimum(uniforms_N * total_N, below_N)
    found_N = torch.searchsorted(cdf_NV, threshold_N[:, None], right=True)[:, 0]
    # Among NaN nothing is found; an index beyond the codebook would end a GPU's process.
    return found_N.clamp(max=cdf_NV.shape[-1] - 1)


def entropy(logits_NV: Tensor) -> Tensor:
    """entropy_N of the distributions of logits (nats)."""
    return -torch.linalg.vecdot(logits_NV.softmax(-1), logits_NV.log_softmax(-1))


def conditional_statistics(
    cond_NV: Tensor, tokens_N: Tensor, probs_NV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logprobs_N of the tokens and entropy_N of the conditional distribution (nats).

    `probs_NV` is the softmax of the logits, where it is known.
    """
    probs_NV = cond_NV.softmax(-1) if probs_NV is None else probs_NV
    logprobs_NV = cond_NV.log_softmax(-1)
    entropy_N = -torch.linalg.vecdot(probs_NV, logprobs_NV)
    return logprobs_NV.gather(1, tokens_N[:, None])[:, 0], entropy_N


def _tempered(guided_NV: Tensor, sampling: Sampling) -> Tensor:
    return guided_NV / sampling.temperature if sampling.temperature != 1 else guided_NV


def _truncated(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """-inf for the tokens that top-k, then top-p leave out."""
    if sampling.top_k:
        logits_NV = _keep_top_k(logits_NV, sampling.top_k)
    return _keep_top_p(logits_NV, sampling.top_p) if sampling.top_p < 1 else logits_NV


def _keep_top_k(logits_NV: Tensor, k: int) -> Tensor:
    """-inf below the k-th largest; tokens equal to it stay."""
    smallest_N1 = logits_NV.topk(min(k, logits_NV.shape[-1])).values[:, -1:]
    return logits_NV.masked_fill(logits_NV < smallest_N1, -math.inf)


def _keep_top_p(logits_NV: Tensor, p: float) -> Tensor:
    """-inf for tokens before which, likeliest first, a share of p is already reached."""
    sorted_NV, order_NV = logits_NV.sort(-1, descending=True)
    probs_NV = sorted_NV.softmax(-1)
    dropped_NV = probs_NV.cumsum(-1) - probs_NV >= p
    dropped_NV[:, 0] = False
    return logits_NV.masked_fill(dropped_NV.scatter(1, order_NV, dropped_NV), -math.inf)
