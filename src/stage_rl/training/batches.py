"""A rollout in pieces of whole groups.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_rl.types import Prompt, Rollout


@dataclass(frozen=True)
class MicroBatch:
    """Some whole groups of a rollout."""

    groups: slice
    """Their places among the groups of the step, which may be spread over ranks."""
    prompts: tuple[Prompt, ...]
    group_size: int
    tokens_NT: Tensor
    sampler_logprobs_NT: Tensor | None = None
    """Conditional log-probabilities by the sampler; None for a rollout without them."""
    sampler_guided_logprobs_NT: Tensor | None = None
    """Those of the distribution that was sampled from."""

    def sampler_logprobs_of(self, logprobs: str) -> Tensor | None:
        """The sampler's under the distribution that `algorithm.logprobs` names."""
        conditional = logprobs == "conditional"
        return self.sampler_logprobs_NT if conditional else self.sampler_guided_logprobs_NT

    def first_images(self, number: int) -> MicroBatch | None:
        """The first images of the first group, at most all of it; None for no image."""
        size = min(number, self.group_size)
        if size == 0:
            return None
        tokens, logprobs, guided = (
            None if values is None else values[:size]
            for values in (
                self.tokens_NT,
                self.sampler_logprobs_NT,
                self.sampler_guided_logprobs_NT,
            )
        )
        assert tokens is not None
        return MicroBatch(slice(0, 1), self.prompts[:1], size, tokens, logprobs, guided)

    def by_group(self, values_NT: Tensor) -> Tensor:
        """NT -> PGT."""
        return values_NT.view(len(self.prompts), self.group_size, -1)


def micro_batches(
    rollout: Rollout,
    groups_per_microbatch: int | None,
    device: torch.device,
    *,
    first_group: int = 0,
) -> Iterator[MicroBatch]:
    """A rollout in pieces of at most `groups_per_microbatch` groups (None: one piece).

    `first_group` is the place of the rollout's first group in the step.
    """
    num_groups, size = len(rollout.prompts), rollout.group_size
    for first in range(0, num_groups, groups_per_microbatch or num_groups):
        last = min(num_groups, first + (groups_per_microbatch or num_groups))
        tokens, logprobs, guided = (
            None if values is None else values[first * size : last * size].to(device)
            for values in (rollout.tokens_NT, rollout.logprobs_NT, rollout.guided_logprobs_NT)
        )
        assert tokens is not None
        yield MicroBatch(
            slice(first_group + first, first_group + last),
            rollout.prompts[first:last],
            size,
            tokens,
            logprobs,
            guided,
        )
