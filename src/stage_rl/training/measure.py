"""What the policy says of the tokens of a step, micro-batch by micro-batch.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, D model width, R rows
of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage_rl.algorithm import exact_kl
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import (
    CONDITIONAL,
    UNCONDITIONAL,
    ReferenceRows,
    Scoring,
    head_logprobs,
)
from stage_rl.policies.matmul import onednn_matmul
from stage_rl.types import Measured, Prompt, Rollout


@dataclass(frozen=True)
class Precision:
    """How the forward passes are computed."""

    mixed: bool = False
    """Matmuls of the trunk in bf16; norms, softmax and the image head stay fp32."""
    round_to_bf16: bool = False
    """Log-probabilities and entropies as bf16 holds them, like the released code."""
    logprob_rows: int = 2048
    """Token rows whose image-head logits exist at one time."""
    scoring: Scoring = CONDITIONAL
    """The distribution that is measured and trained."""


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
    guided_entropy_NT: Tensor | None = None
    """By the sampler, where it was asked for it."""

    def sampler_logprobs_of(self, logprobs: str) -> Tensor | None:
        """The sampler's under the distribution that `algorithm.logprobs` names."""
        conditional = logprobs == "conditional"
        return self.sampler_logprobs_NT if conditional else self.sampler_guided_logprobs_NT

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
    stride = groups_per_microbatch or num_groups
    for first in range(0, num_groups, stride):
        last = min(num_groups, first + stride)
        rows = slice(first * size, last * size)
        known = (
            None if values is None else values[rows].to(device)
            for values in (
                rollout.logprobs_NT,
                rollout.guided_logprobs_NT,
                rollout.guided_entropy_NT,
            )
        )
        yield MicroBatch(
            slice(first_group + first, first_group + last),
            rollout.prompts[first:last],
            size,
            rollout.tokens_NT[rows].to(device),
            *known,
        )


def measure(
    policy: Policy,
    batch: MicroBatch,
    precision: Precision,
    *,
    entropy_grad: bool = False,
    reference: ReferenceRows | None = None,
    with_states: bool = False,
) -> Measured:
    """Teacher-forced log-probability and entropy of every token under the scored distribution, NT,
    with gradient; with a `reference` the divergence from it.
    """
    logprobs_NT, entropy_NT, *more = policy(
        batch.prompts,
        batch.tokens_NT,
        group_size=batch.group_size,
        scoring=precision.scoring,
        mixed=precision.mixed,
        chunk_rows=precision.logprob_rows,
        entropy_grad=entropy_grad,
        reference=reference,
        with_states=with_states,
    )
    kl_NT = more.pop(0) if reference else None
    if precision.round_to_bf16:
        logprobs_NT, entropy_NT = _as_bf16(logprobs_NT), _as_bf16(entropy_NT)
    return Measured(logprobs_NT, entropy_NT, kl_NT, more[0] if with_states else None)


def _as_bf16(values: Tensor) -> Tensor:
    """Rounded to what bf16 holds; the gradient passes."""
    return values + (values.detach().bfloat16().to(values.dtype) - values.detach())


@torch.no_grad()
def measure_all(
    policy: Policy,
    batches: Sequence[MicroBatch],
    precision: Precision,
    *,
    with_states: bool = False,
) -> list[Measured]:
    """`measure` without gradient, for the reference."""
    return [measure(policy, batch, precision, with_states=with_states) for batch in batches]


STATES_FOR = ("conditional", "unconditional", "exact_guidance")
"""What a credit function may need that the head alone makes from states."""


def spares_a_pass(needs: Sequence[str], scoring: Scoring) -> bool:
    """Whether what is needed can be made from states that are measured anyway."""
    one_pass = ("exact_guidance",)
    return not {*(STATES_FOR if scoring.has_two_passes else one_pass)}.isdisjoint(needs)


@torch.no_grad()
def needed_inputs(
    policy: Policy,
    batch: MicroBatch,
    old: Measured,
    precision: Precision,
    needs: Sequence[str],
) -> dict[str, Tensor]:
    """What a credit function is marked to need, by the field of `MeasuredGroups`. `old` is what
    the policy measured as `precision` says, which is used where it is what is needed, as are its
    states where it has them.
    """

    def embeddings() -> Tensor:
        with policy.unsharded():
            embeds_NTD = policy.embed(batch.tokens_NT)
        return embeds_NTD.unflatten(0, (len(batch.prompts), batch.group_size))

    def guided_entropy() -> Tensor:
        assert batch.guided_entropy_NT is not None, "the rollout holds no guided entropy"
        return batch.by_group(batch.guided_entropy_NT)

    known: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "conditional": (
            "cond_logprobs_PGT",
            lambda: logprobs_under(CONDITIONAL, policy, batch, old, precision),
        ),
        "unconditional": (
            "uncond_logprobs_PGT",
            lambda: logprobs_under(UNCONDITIONAL, policy, batch, old, precision),
        ),
        "exact_guidance": ("guidance_kl_PGT", lambda: guidance_kl(policy, batch, old, precision)),
        "embeddings": ("embeddings_PGTD", embeddings),
        "guided_entropy": ("guided_entropy_PGT", guided_entropy),
    }
    return {field: make() for field, make in (known[name] for name in needs)}


def logprobs_under(
    scoring: Scoring, policy: Policy, batch: MicroBatch, old: Measured, precision: Precision
) -> Tensor:
    """Log-probabilities of the tokens under a distribution of one pass, PGT: those that are known,
    else by the head from known states, else by a pass of their own.
    """
    if scoring == precision.scoring:
        return batch.by_group(old.logprobs_NT)
    states_NTD = _known_states(scoring, old, precision)
    if states_NTD is None:
        measured = measure(policy, batch, replace(precision, scoring=scoring))
        return batch.by_group(measured.logprobs_NT)
    with policy.unsharded():
        logprobs_N, _ = head_logprobs(
            policy.head,
            states_NTD.flatten(0, 1),
            batch.tokens_NT.flatten(),
            chunk_rows=precision.logprob_rows,
        )
    logprobs_NT = logprobs_N.view_as(batch.tokens_NT)
    return batch.by_group(_as_bf16(logprobs_NT) if precision.round_to_bf16 else logprobs_NT)


def _known_states(scoring: Scoring, old: Measured, precision: Precision) -> Tensor | None:
    """States of a distribution of one pass among those that were kept, NTD."""
    states_NTW, scored = old.states_NTW, precision.scoring
    if states_NTW is None:
        return None
    if scored.has_two_passes:
        return states_NTW.chunk(2, -1)[scoring == UNCONDITIONAL]
    return states_NTW if scoring == CONDITIONAL else None


def guidance_kl(policy: Policy, batch: MicroBatch, old: Measured, precision: Precision) -> Tensor:
    """KL(conditional, unconditional) of every token, summed over the codebook, PGT."""
    both = []

    def logits(rows_RD: Tensor) -> Tensor:
        logits_RV = policy.head(rows_RD)
        return logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))

    with policy.unsharded(), onednn_matmul(policy.device):
        for scoring in (CONDITIONAL, UNCONDITIONAL):
            states_NTD = _known_states(scoring, old, precision)
            if states_NTD is None:
                states_NTD = policy.states(
                    batch.prompts,
                    batch.tokens_NT,
                    group_size=batch.group_size,
                    scoring=scoring,
                    mixed=precision.mixed,
                )
            both.append(states_NTD.flatten(0, 1).split(precision.logprob_rows))
        kl_R = [
            exact_kl(logits(cond_RD), logits(uncond_RD))
            for cond_RD, uncond_RD in zip(*both, strict=True)
        ]
    return batch.by_group(torch.cat(kl_R).view_as(batch.tokens_NT))
