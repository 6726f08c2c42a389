"""Which distribution of image tokens is scored: the conditional one, or the guided one.

Guided logits are unconditional + scale x (conditional - unconditional), over the temperature. Their
rows hold both states side by side, so that the chunked image head takes them like any others: row
by row, with its own backward pass.

Shape suffixes: N completions, T image tokens, R rows, D model width, W width of a row (D, or 2 D
with guidance), V codebook size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage_rl.policies.base import Policy, Prefix
from stage_rl.rollout.sampling import Sampling, guide
from stage_rl.training.logprobs import Head


@dataclass(frozen=True)
class Scoring:
    """The distribution under which policy and reference measure log-probability and entropy."""

    logprobs: Literal["conditional", "guided", "guided_detached"] = "conditional"
    """conditional: at temperature 1; guided_detached: no gradient through the unconditional pass.
    """
    guidance_scale: float = 1.0
    """Of the guided forms; 1 needs no unconditional pass."""
    temperature: float = 1.0
    """Of the guided forms."""

    @property
    def has_two_passes(self) -> bool:
        """Whether an unconditional pass belongs to it."""
        return self.logprobs != "conditional" and self.guidance_scale != 1

    @property
    def has_two_gradients(self) -> bool:
        """Whether a gradient goes through the unconditional pass."""
        return self.has_two_passes and self.logprobs == "guided"

    def states(self, policy: Policy, prefix: Prefix, tokens_NT: Tensor) -> Tensor:
        """The states that `head` reads, states_NTW, with gradient where the form has one."""
        cond_NTD = policy.hidden(prefix, tokens_NT)
        if not self.has_two_passes:
            return cond_NTD
        with self._unconditional():
            uncond_NTD = policy.hidden(prefix.unconditional(), tokens_NT)
        return torch.cat([cond_NTD, uncond_NTD], -1)

    def head(self, policy: Policy) -> Head:
        """Rows of states to logits over V: R x W -> R x V."""
        if self.logprobs == "conditional":
            return policy.head
        if not self.has_two_passes:
            return lambda rows_RD: policy.head(rows_RD) / self.temperature
        return lambda rows_RW: self._guided_logits(policy.head, rows_RW)

    def _guided_logits(self, head: Head, rows_RW: Tensor) -> Tensor:
        cond_RD, uncond_RD = rows_RW.chunk(2, -1)
        with self._unconditional():
            uncond_RV = head(uncond_RD)
        # Guidance amplifies the rounding of a head in bf16, so it is applied in fp32.
        wide = torch.promote_types(uncond_RV.dtype, torch.float32)
        logits_RV = guide(head(cond_RD).to(wide), uncond_RV.to(wide), self.guidance_scale)
        return logits_RV / self.temperature

    def _unconditional(self) -> torch.no_grad | nullcontext[None]:
        return torch.no_grad() if self.logprobs == "guided_detached" else nullcontext()


CONDITIONAL = Scoring()


def scoring_of(
    logprobs: Literal["conditional", "guided", "guided_detached"], sampling: Sampling
) -> Scoring:
    """The scoring of a recipe: guided forms score what was sampled from, so nothing can differ."""
    if logprobs == "conditional":
        return CONDITIONAL
    return Scoring(logprobs, sampling.guidance_scale, sampling.temperature)
