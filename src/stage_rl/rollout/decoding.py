"""The decode of one pass: buffers whose addresses stay, and the step that reads and writes them.

Shape suffixes: N completions, R rows (N conditional, then with guidance N unconditional),
T image tokens, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stage_rl.rollout.attention import KeyValueCache
from stage_rl.rollout.decoder import Decoder
from stage_rl.rollout.sampling import Sampling, conditional_statistics, draw, guide


@dataclass(frozen=True)
class Generated:
    """Image tokens, row i * G + k for image k of prompt i, and what the sampler knew of them.

    A forced token has log-probability and entropy 0.
    """

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

    def clone(self) -> Generated:
        """A copy that the next pass leaves alone."""
        return Generated(*(getattr(self, field.name).clone() for field in fields(Generated)))


class Decoding:
    """A pass of a number of images: `begin` it, `advance` T - 1 times, `draw` the last token.

    Which token is next, and where each row stands, is kept on the device, so that all calls of
    `advance` are one and the same work, which a CUDA graph can replay. The forced ids are -1 where
    a token is sampled; None: all are.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KeyValueCache,
        sampling: Sampling,
        *,
        uniforms_NT: Tensor,
        forced_T: Tensor | None,
    ):
        self._decoder, self._cache, self._sampling = decoder, cache, sampling
        device, num_images = uniforms_NT.device, len(uniforms_NT)
        assert cache.num_rows in (num_images, 2 * num_images)
        self._uniforms_NT = torch.empty_like(uniforms_NT)
        self._forced_T = None if forced_T is None else forced_T.to(device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self._positions_R = torch.zeros(cache.num_rows, dtype=torch.long, device=device)
        self._logits_RV = torch.empty((cache.num_rows, len(decoder.token_embeds_VD)), device=device)
        self.generated = Generated.empty(uniforms_NT)
        """Complete after the last draw; the next pass overwrites it."""

    def begin(self, uniforms_NT: Tensor, logits_RV: Tensor, positions_R: Tensor) -> None:
        """Takes what a prefill left: the logits of the first token and its slot in each row."""
        self._uniforms_NT.copy_(uniforms_NT)
        self._logits_RV.copy_(logits_RV)
        self._positions_R.copy_(positions_R)
        self._step.zero_()

    def advance(self, num_live: int) -> None:
        """Draws the next token of every image and runs the decoder on it.

        `num_live` bounds the slots that are read where the backend needs a bound.
        """
        embeds_ND = self._decoder.token_embeds_VD[self.draw()]
        states_RD = self._decoder.step(
            embeds_ND.repeat(len(self._positions_R) // len(embeds_ND), 1),
            self._positions_R,
            self._cache,
            num_live=num_live,
        )
        self._decoder.logits(states_RD, self._logits_RV)
        self._positions_R += 1
        self._step += 1

    def draw(self) -> Tensor:
        """Draws the next token of every image and records what is known of it; tokens_N."""
        num_images, sampling = len(self._uniforms_NT), self._sampling
        cond_NV = self._logits_RV[:num_images]
        uncond_NV = self._logits_RV[num_images:] if sampling.guided else None
        guided_NV = guide(cond_NV, uncond_NV, sampling.guidance_scale)
        uniforms_N = self._uniforms_NT.index_select(1, self._step)[:, 0]
        tokens_N, guided_logprobs_N = draw(guided_NV, uniforms_N, sampling)
        logprobs_N, entropy_N = conditional_statistics(cond_NV, tokens_N)
        known = (tokens_N, logprobs_N, guided_logprobs_N, entropy_N)
        if self._forced_T is not None:
            forced_1 = self._forced_T.index_select(0, self._step)
            nothing_N = torch.zeros_like(uniforms_N)
            known = tuple(
                torch.where(forced_1 < 0, value_N, instead)
                for value_N, instead in zip(known, (forced_1, *[nothing_N] * 3), strict=True)
            )
        for field, value_N in zip(fields(Generated), known, strict=True):
            getattr(self.generated, field.name).index_copy_(1, self._step, value_N[:, None])
        return known[0]
