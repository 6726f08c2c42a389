"""Measure, credit, learn: from a rollout and its rewards to one or more updates of the policy.

What each token is credited with is in `stage_rl.objective.credit`, the policy loss in
`stage_rl.objective.loss`.

Everything runs micro-batch by micro-batch, each of whole groups. A group's credit needs its own
samples only, so the forward pass that measures the policy is the one that the first update learns
from.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.distributed import concat
from stage_rl.errors import DivergedError
from stage_rl.objective.advantage import reward_terms
from stage_rl.objective.credit import TokenCredit, assign_credit
from stage_rl.objective.kl import kl_metrics
from stage_rl.objective.loss import LossFunction, LossInputs, policy_loss
from stage_rl.objective.record import CreditFunction, MeasuredGroups
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import ReferenceRows
from stage_rl.settings import needs_of
from stage_rl.training.measure import MicroBatch, Precision, measure, needed_inputs, spares_a_pass
from stage_rl.training.optim import apply_gradient, check_parameters
from stage_rl.types import Measured, Rewards


@dataclass(frozen=True)
class Update:
    """How a rollout is learned from."""

    settings: AlgorithmConfig
    credit: CreditFunction
    loss: LossFunction
    precision: Precision
    num_updates: int
    rate: float
    """Learning rate."""
    max_grad_norm: float | None
    kl_reference: Policy | None = None
    """Whose distributions the exact KL is computed from; None: an estimate will do."""


@dataclass(frozen=True)
class UpdateStats:
    """What the updates of a step did, without gradient."""

    measured: Measured
    """Under the policy before the first update."""
    credit: TokenCredit
    losses: Mapping[str, Tensor]
    """Of the last update, scalars by metric name, over all micro-batches."""
    grad_norm: float


def measure_to_learn(
    policy: Policy, batch: MicroBatch, update: Update, ref: Measured | None = None
) -> Measured:
    """`measure` with the gradients that the update needs. `ref` is what the reference measured,
    with its states, where the KL is exact. The states come along where they spare the rule of
    token credit a pass.
    """
    precision = update.precision
    measured = partial(
        measure,
        policy,
        batch,
        precision,
        entropy_grad=update.settings.entropy.mode == "loss",
        with_states=spares_a_pass(needs_of(update.credit), precision.scoring),
    )
    reference = update.kl_reference
    if reference is None:
        return measured()
    assert ref is not None
    assert ref.states_NTW is not None

    is_whole = False

    def head(rows_RW: Tensor) -> Tensor:
        # A head that trains is computed again in the backward pass, behind the block below.
        with nullcontext() if is_whole else reference.unsharded(), reference.adapter():
            return precision.scoring.logits(reference.head, rows_RW)

    rows = ReferenceRows(head, ref.states_NTW.flatten(0, 1))
    with reference.unsharded():
        is_whole = True
        now = measured(reference=rows)
    is_whole = False
    return now


def learn(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[MicroBatch],
    *,
    first: Measured,
    rewards: Rewards,
    reference: Sequence[Measured],
    update: Update,
    record: Callable[[str], None] | None = None,
) -> UpdateStats:
    """One or more updates on a rollout. The old policy is the one before the first of them.

    `first` is `measure_to_learn` of the first micro-batch: the caller asks for it, because the
    rewards may be waited for behind it. At least one group is valid. A loss or gradient that is not
    finite is a DivergedError. `record` is told when the time for learning, `learn_s`, or for what a
    credit function needs, `credit_s`, has passed.
    """
    num_valid = int(rewards.valid_P.sum())
    terms = reward_terms(rewards, update.settings)
    old, credits, losses = [], [], []
    try:
        for index, batch in enumerate(batches):
            ref = reference[index]
            now = measure_to_learn(policy, batch, update, ref) if index else first
            old.append(Measured(now.logprobs_NT.detach(), now.entropy_NT.detach()))
            groups = replace(
                measured_groups(policy, batch, old[index], ref, rewards=rewards, update=update),
                terms=terms and terms.of(batch.groups, policy.device),
                **_needed(policy, batch, now, update, record),
            )
            credits.append(assign_credit(update.credit, groups, update.settings))
            loss = batch_losses(batch, now, old[index], ref, credits[index], update)
            losses.append(_backward(loss, batch, num_valid))
        norm = apply_gradient(optimizer, rate=update.rate, max_grad_norm=update.max_grad_norm)
    except DivergedError as error:
        raise DivergedError(f"{error}; the parameters were left as they were") from error

    for _ in range(update.num_updates - 1):
        losses = []
        for batch, before, ref, credit in zip(batches, old, reference, credits, strict=True):
            now = measure_to_learn(policy, batch, update, ref)
            loss = batch_losses(batch, now, before, ref, credit, update)
            losses.append(_backward(loss, batch, num_valid))
        norm = apply_gradient(optimizer, rate=update.rate, max_grad_norm=update.max_grad_norm)

    check_parameters(optimizer, rate=update.rate)
    total = total_losses(concat(losses))
    return UpdateStats(concat(old), concat(credits), total, norm.item())


@torch.no_grad()
def measured_groups(
    policy: Policy,
    batch: MicroBatch,
    old: Measured,
    ref: Measured,
    *,
    rewards: Rewards,
    update: Update,
) -> MeasuredGroups:
    """What the credit of a micro-batch is made from, group by group and on the policy's device,
    without what a function needs beyond that.
    """
    by_group, device = batch.by_group, old.logprobs_NT.device
    sampler_NT = batch.sampler_logprobs_of(update.settings.logprobs)
    with policy.unsharded():
        codes_NTC = policy.codes(batch.tokens_NT)
    return MeasuredGroups(
        summed_rewards_PG=rewards.rewards_PG[batch.groups].to(device),
        scores={
            name: column_PG[batch.groups].to(device)
            for name, column_PG in rewards.columns.items()
            if name in rewards.weights
        },
        valid_P=rewards.valid_P[batch.groups].to(device, rewards.rewards_PG.dtype),
        codes_PGTC=codes_NTC.view(len(batch.prompts), batch.group_size, *codes_NTC.shape[1:]),
        grid=policy.layout.grid,
        vocab=policy.codebook_size,
        logprobs_PGT=by_group(old.logprobs_NT),
        ref_logprobs_PGT=by_group(ref.logprobs_NT),
        entropy_PGT=by_group(old.entropy_NT),
        ref_entropy_PGT=by_group(ref.entropy_NT),
        sampler_logprobs_PGT=None if sampler_NT is None else by_group(sampler_NT),
    )


def _needed(
    policy: Policy,
    batch: MicroBatch,
    now: Measured,
    update: Update,
    record: Callable[[str], None] | None,
) -> dict[str, Tensor]:
    needs = needs_of(update.credit)
    if not needs:
        return {}
    if record:
        record("learn_s")
    known = replace(now, logprobs_NT=now.logprobs_NT.detach())
    needed = needed_inputs(policy, batch, known, update.precision, needs)
    if record:
        record("credit_s")
    return needed


def batch_losses(
    batch: MicroBatch,
    now: Measured,
    old: Measured,
    ref: Measured,
    credit: TokenCredit,
    update: Update,
) -> dict[str, Tensor]:
    """The losses of a micro-batch by metric name, means over its tokens; loss/total has the
    gradient. loss/entropy is the penalty of equations 13 and 14, 0 where the recipe has none.
    """
    settings, by_group = update.settings, batch.by_group
    sampler_NT = batch.sampler_logprobs_of(settings.logprobs)
    inputs = LossInputs(
        by_group(now.logprobs_NT),
        old_logprobs_PGT=by_group(old.logprobs_NT),
        ref_logprobs_PGT=by_group(ref.logprobs_NT),
        sampler_logprobs_PGT=None if sampler_NT is None else by_group(sampler_NT),
        advantages_PGT=credit.advantages_PGT,
        beta_PGT=credit.beta_PGT,
        valid_P=credit.valid_P,
        exact_kl_PGT=None if now.kl_NT is None else by_group(now.kl_NT),
    )
    loss = policy_loss(update.loss, inputs, settings)
    penalty = inputs.logprobs_PGT.new_zeros(())
    if settings.entropy.mode == "loss":
        entropy_PG, ref_entropy_PG = (
            algorithm.completion_entropy(by_group(m.entropy_NT)) * credit.valid_P[:, None]
            for m in (now, ref)
        )
        penalty = algorithm.entropy_penalty(
            entropy_PG, ref_entropy_PG, settings.entropy.penalty_scale
        )
    return {
        **loss.metrics,
        **kl_metrics(inputs.logprobs_PGT, inputs.ref_logprobs_PGT, credit.valid_P),
        "loss/total": loss.total + penalty,
        "loss/policy": loss.policy,
        "loss/kl": loss.kl,
        "loss/entropy": penalty,
    }


def _backward(losses: Mapping[str, Tensor], batch: MicroBatch, num_valid: int) -> dict[str, Tensor]:
    """Adds a micro-batch's gradient to that of the step; its share of the step's losses, each a
    tensor of one number.
    """
    for name in ("policy", "kl", "entropy", "total"):
        value = losses[f"loss/{name}"]
        if not value.isfinite():
            texts = ", ".join(f"'{prompt.text}'" for prompt in batch.prompts[:2])
            raise DivergedError(
                f"the {name} loss is {value.item()} (prompts {texts}); lower optimizer.lr, or "
                "raise algorithm.beta"
            )
    # A group that was dropped from the step counts in the batch's mean, as 0, but not in num_valid.
    share = len(batch.prompts) / num_valid
    (losses["loss/total"] * share).backward()
    return {
        name: (value.detach() * (1 if name.endswith("/max") else share))[None]
        for name, value in losses.items()
    }


def total_losses(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars from the shares of micro-batches or ranks: their sum, the largest of a /max."""
    return {
        name: values.amax() if name.endswith("/max") else values.sum()
        for name, values in parts.items()
    }
