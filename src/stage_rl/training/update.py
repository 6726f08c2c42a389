"""Measure and learn: from a judged rollout to one or more updates of the policy.

Everything runs micro-batch by micro-batch, each of whole groups. A group's advantages need its own
samples only, so with one update per rollout the forward pass that measures also learns.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, W width of a head's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from stage_rl import algorithm
from stage_rl.errors import DivergedError
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import CONDITIONAL, Scoring
from stage_rl.recipe import AlgorithmConfig
from stage_rl.training.optim import apply_gradient
from stage_rl.types import Measured, Prompt, Rewards, Rollout


@dataclass(frozen=True)
class Precision:
    """How the forward passes are computed."""

    mixed: bool = False
    """Products of the trunk in bf16; norms, softmax and the image head stay fp32."""
    round_to_bf16: bool = False
    """Log-probabilities and entropies as bf16 holds them, like the released code."""
    logprob_rows: int = 2048
    """Token rows whose image-head logits exist at one time."""
    scoring: Scoring = CONDITIONAL
    """The distribution that is measured and trained."""


@dataclass(frozen=True)
class Update:
    """How a rollout is learned from."""

    settings: AlgorithmConfig
    precision: Precision
    num_updates: int
    rate: float
    """Learning rate."""
    max_grad_norm: float | None


class Losses(NamedTuple):
    """The loss of an update and its parts, scalars; total = policy + kl + entropy."""

    total: Tensor
    policy: Tensor
    kl: Tensor
    entropy: Tensor
    """The penalty of equations 13 and 14; 0 where the recipe has none."""
    clip_fraction: Tensor
    mean_kl: Tensor
    """k3 estimate per token, without beta and weight."""


@dataclass(frozen=True)
class UpdateStats:
    """What a step did, for metrics and logs; without gradient."""

    measured: Measured
    """Under the policy before the first update."""
    credits: tuple[Credit, ...]
    """Of each micro-batch."""
    losses: Losses
    """Of the last update, over all micro-batches."""
    grad_norm: float


def measure(
    policy: Policy, batch: MicroBatch, precision: Precision, *, entropy_grad: bool = False
) -> Measured:
    """Teacher-forced log-probability and entropy of every token under the scored distribution, NT,
    with gradient.
    """
    logprobs_NT, entropy_NT = policy(
        batch.prompts,
        batch.tokens_NT,
        group_size=batch.group_size,
        scoring=precision.scoring,
        mixed=precision.mixed,
        chunk_rows=precision.logprob_rows,
        entropy_grad=entropy_grad,
    )
    if precision.round_to_bf16:
        logprobs_NT, entropy_NT = _as_bf16(logprobs_NT), _as_bf16(entropy_NT)
    return Measured(logprobs_NT, entropy_NT)


def measure_all(
    policy: Policy, batches: Sequence[MicroBatch], precision: Precision
) -> list[Measured]:
    """`measure` without gradient, for the reference."""
    with torch.no_grad():
        return [measure(policy, batch, precision) for batch in batches]


def learn(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    *,
    verdict: Callable[[], Rewards],
    reference: Sequence[Measured],
    update: Update,
) -> UpdateStats | None:
    """One or more updates on a rollout; None where no group was judged. The old policy is the one
    of the first pass.

    `verdict` is asked for after the forward pass of the first micro-batch, behind which a reward
    may hide. A loss or gradient that is not finite is a DivergedError.
    """
    first = _FirstPass([], [], [_measure_to_learn(policy, batches[0], update)])
    judged = verdict()
    if not judged.valid_P.any():
        return None

    def one_update() -> tuple[Losses, Tensor]:
        losses = _backward(
            policy, batches, judged=judged, reference=reference, update=update, first=first
        )
        return losses, apply_gradient(
            optimizer, rate=update.rate, max_grad_norm=update.max_grad_norm
        )

    try:
        losses, norm = one_update()
    except DivergedError as error:
        raise DivergedError(f"{error}; the parameters were left as they were") from error
    for _ in range(update.num_updates - 1):
        losses, norm = one_update()
    return UpdateStats(
        measured=first.measured(),
        credits=tuple(first.credits),
        losses=losses,
        grad_norm=norm.item(),
    )


class _FirstPass(NamedTuple):
    """What the first pass leaves for all, by micro-batch."""

    old: list[Measured]
    credits: list[Credit]
    begun: list[Measured]
    """Of the first micro-batch, with gradient, until it is learned from."""

    def measured(self) -> Measured:
        """All micro-batches in one."""
        logprobs = [measured.logprobs_NT for measured in self.old]
        return Measured(torch.cat(logprobs), torch.cat([part.entropy_NT for part in self.old]))


def _measure_to_learn(policy: Policy, batch: MicroBatch, update: Update) -> Measured:
    penalized = update.settings.entropy.mode == "loss"
    return measure(policy, batch, update.precision, entropy_grad=penalized)


def _backward(
    policy: Policy,
    batches: Sequence[MicroBatch],
    *,
    judged: Rewards,
    reference: Sequence[Measured],
    update: Update,
    first: _FirstPass,
) -> Losses:
    """The losses and their gradient, summed over the micro-batches; fills `first` once."""
    num_kept, settings = int(judged.valid_P.sum()), update.settings
    parts: list[Losses] = []
    for index, (batch, ref) in enumerate(zip(batches, reference, strict=True)):
        now = first.begun.pop() if first.begun else _measure_to_learn(policy, batch, update)
        if len(first.old) == index:
            first.old.append(Measured(now.logprobs_NT.detach(), now.entropy_NT.detach()))
            first.credits.append(_credit(policy, batch, first.old[index], ref, judged, settings))
        losses = _losses(batch, now, first.old[index], ref, first.credits[index], settings)
        _check_finite(losses, batch)
        # A group that left the step counts in the batch's mean, as 0, but not in num_kept.
        share = len(batch.prompts) / num_kept
        (losses.total * share).backward()
        parts.append(Losses(*(value.detach() * share for value in losses)))
    return Losses(*(torch.stack(values).sum() for values in zip(*parts, strict=True)))


def _credit(
    policy: Policy,
    batch: MicroBatch,
    old: Measured,
    ref: Measured,
    judged: Rewards,
    settings: AlgorithmConfig,
) -> Credit:
    device = old.logprobs_NT.device
    with policy.gathered():
        codes_NTC = policy.codes(batch.tokens_NT)
    credits = credit(
        judged.rewards_PG[batch.groups].to(device),
        valid_P=judged.valid_P[batch.groups].to(device),
        entropy_PG=algorithm.completion_entropy(batch.by_group(old.entropy_NT)),
        ref_entropy_PG=algorithm.completion_entropy(batch.by_group(ref.entropy_NT)),
        codes_PGTC=codes_NTC.view(len(batch.prompts), batch.group_size, *codes_NTC.shape[1:]),
        settings=settings,
    )
    if settings.importance_sampling == "none":
        return credits
    sampler_NT = batch.sampler_logprobs_of(settings.logprobs)
    assert sampler_NT is not None, "the rollout holds no log-probabilities of the sampler"
    return importance_weighted(
        credits,
        batch.by_group(old.logprobs_NT),
        batch.by_group(sampler_NT),
        cap=settings.importance_cap,
    )


def _losses(
    batch: MicroBatch,
    now: Measured,
    old: Measured,
    ref: Measured,
    weights: Credit,
    settings: AlgorithmConfig,
) -> Losses:
    logprobs_PGT = batch.by_group(now.logprobs_NT)
    # With clip an infinity, equation 3 is the released code's exp(logp - logp.detach()) x A.
    clip = settings.clip if settings.ratio == "clipped" else math.inf
    kl_PGT = algorithm.token_kl(logprobs_PGT, batch.by_group(ref.logprobs_NT))
    grpo = algorithm.grpo_loss(
        algorithm.importance_ratio(logprobs_PGT, batch.by_group(old.logprobs_NT)),
        weights.advantages_PGT,
        kl_PGT,
        clip=clip,
        clip_high=settings.clip_high if settings.ratio == "clipped" else None,
        beta=settings.beta * weights.kl_weight_PGT,
    )
    penalty = logprobs_PGT.new_zeros(())
    if settings.entropy.mode == "loss":
        valid_P1 = weights.valid_P[:, None]
        entropy_PG, ref_entropy_PG = (
            algorithm.completion_entropy(batch.by_group(measured.entropy_NT)) * valid_P1
            for measured in (now, ref)
        )
        penalty = algorithm.entropy_penalty(
            entropy_PG, ref_entropy_PG, settings.entropy.penalty_scale
        )
    return Losses(
        total=grpo.total + penalty,
        policy=grpo.policy,
        kl=grpo.kl,
        entropy=penalty,
        clip_fraction=grpo.clip_fraction,
        mean_kl=(kl_PGT * weights.valid_P[:, None, None]).mean(),
    )


def _check_finite(losses: Losses, batch: MicroBatch) -> None:
    for name in ("policy", "kl", "entropy"):
        value = getattr(losses, name)
        if not value.isfinite():
            texts = ", ".join(f"'{prompt.text}'" for prompt in batch.prompts[:2])
            raise DivergedError(
                f"the {name} loss is {value.item()} (prompts {texts}); lower optimizer.lr, or "
                "raise algorithm.beta"
            )


def _as_bf16(values: Tensor) -> Tensor:
    """Rounded to what bf16 holds; the gradient passes."""
    return values + (values.detach().bfloat16().to(values.dtype) - values.detach())


# A rollout in pieces of whole groups.
#
# Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.


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


# From rewards and entropies to what each token is credited with: equations 2, 5 to 8, 11, 12.
#
# Shape suffixes: P prompts, G group, T image tokens, C codebook channels.


@dataclass(frozen=True)
class Credit:
    """The weights of the loss for some groups; constants, without gradient."""

    rewards_PG: Tensor
    """With the entropy bonus."""
    equal_P: Tensor
    """Groups whose rewards were all equal before the bonus."""
    valid_P: Tensor
    """0 for groups that left the step, else 1."""
    similarity_PGT: Tensor
    mask_PGT: Tensor
    """Equation 7; the advantages also carry its normalization, and importance weights if any."""
    advantages_PGT: Tensor
    kl_weight_PGT: Tensor
    """Factor of beta."""


def credit(
    rewards_PG: Tensor,
    *,
    valid_P: Tensor,
    entropy_PG: Tensor,
    ref_entropy_PG: Tensor,
    codes_PGTC: Tensor,
    settings: AlgorithmConfig,
) -> Credit:
    """Credits the tokens of whole groups; a group's credit needs nothing of the others."""
    equal_P = algorithm.equal_reward_groups(rewards_PG)
    factors = algorithm.equal_group_factors(equal_P, settings.equal_reward_groups)
    valid_P = valid_P.to(rewards_PG.dtype)
    rewards_PG = _with_bonus(rewards_PG, entropy_PG, ref_entropy_PG, settings)
    advantages_PG = algorithm.group_advantages(
        rewards_PG, settings.advantage_eps, settings.advantage_std_floor
    )
    sim_PGT = _similarity(codes_PGTC, advantages_PG, rewards_PG, settings)
    mask_PGT = factor_PGT = sim_PGT.new_ones(sim_PGT.shape)
    if settings.reweights_advantages:
        mask_PGT = factor_PGT = algorithm.advantage_mask(sim_PGT)
        if settings.mask_normalization == "group_mean":
            factor_PGT = algorithm.normalize_mask(mask_PGT)
    weight_PGT = sim_PGT.new_ones(sim_PGT.shape)
    if settings.weights_kl:
        kl = settings.kl
        weight_PGT = algorithm.kl_weight(sim_PGT, kl.a, kl.b, weight_clip=kl.weight_clip)
    return Credit(
        rewards_PG=rewards_PG,
        equal_P=equal_P,
        valid_P=valid_P,
        similarity_PGT=sim_PGT,
        mask_PGT=mask_PGT,
        advantages_PGT=algorithm.reweight_advantages(
            advantages_PG * (factors.policy_P * valid_P)[:, None], factor_PGT
        ),
        kl_weight_PGT=weight_PGT * (factors.kl_P * valid_P)[:, None, None],
    )


def importance_weighted(
    credits: Credit, logprobs_PGT: Tensor, sampler_logprobs_PGT: Tensor, *, cap: float
) -> Credit:
    """Credits whose advantages are weighted by how much likelier the trainer holds each token.

    The policy term is linear in the advantage and the weight is above 0, so that term is weighted.
    """
    weight_PGT = algorithm.truncated_importance(logprobs_PGT, sampler_logprobs_PGT, cap)
    return replace(credits, advantages_PGT=credits.advantages_PGT * weight_PGT)


def _similarity(
    codes_PGTC: Tensor, advantages_PG: Tensor, rewards_PG: Tensor, settings: AlgorithmConfig
) -> Tensor:
    sim_PGT = algorithm.opposing_similarity(
        codes_PGTC, advantages_PG, self_similarity=settings.self_similarity
    )
    if settings.equal_group_similarity is None:
        return sim_PGT
    undecided_P = algorithm.equal_reward_groups(rewards_PG)
    return algorithm.equal_group_similarity(sim_PGT, undecided_P, settings.equal_group_similarity)


def _with_bonus(
    rewards_PG: Tensor, entropy_PG: Tensor, ref_entropy_PG: Tensor, settings: AlgorithmConfig
) -> Tensor:
    entropy = settings.entropy
    if entropy.mode != "reward":
        return rewards_PG
    bonus_PG = algorithm.entropy_bonus(entropy_PG, ref_entropy_PG)
    return algorithm.add_entropy_bonus(
        rewards_PG, bonus_PG, entropy.scale, scope=entropy.scope, centred=entropy.centred
    )
