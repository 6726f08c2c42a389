"""`stage bench conflict`: which tokens of a group pull against each other, and what the mask does.

At token t of a group the gradients of its samples with regard to the last hidden state are
g_it = A_i M_it d log pi(x_it) / d h_it. Their conflict is C_t = 1 - |sum_i g_it| / sum_i |g_it|:
0 where all pull the same way, 1 where they cancel; gradients at right angles to each other, which
have nothing to do with each other, give 1 - (sum_i |g_it|^2)^(1/2) / sum_i |g_it|. The paper says
that look-alike tokens with opposite advantages cancel (arXiv 2509.25027, section 3.2); here it is
measured, by deciles of their similarity and, in the shapes world, on background and objects apart.

Shape suffixes: P prompts, G group, N = P x G images, T image tokens, W width of a row, K the three
sums of a conflict.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups
from stage_rl.api import find_source
from stage_rl.bench.base import BenchResult, flat, table
from stage_rl.bench.signal.gradient_signal import without_update
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.evaluation.results import object_cells
from stage_rl.policies.logprobs import head_logprobs
from stage_rl.shapes.gold import inspect
from stage_rl.training.measure import MicroBatch, micro_batches
from stage_rl.training.metrics import Step
from stage_rl.training.trainer import Trainer, build_trainer

BAR = "the most similar tenth conflicts more than gradients at right angles would"
NUM_PARTS = 10


class Tokens(NamedTuple):
    """What is known of the tokens of some groups; sums over the G samples at each position."""

    similarity_PT: Tensor
    """Mean over the group."""
    plain_PTK: Tensor
    """|sum_i g_it|, sum_i |g_it| and (sum_i |g_it|^2)^(1/2) without a mask."""
    masked_PTK: Tensor
    objects_PT: Tensor
    """Share of the samples that show an object there."""
    background_PT: Tensor
    """Masked |A| of the samples that show background there."""
    advantage_PT: Tensor
    """Masked |A| of all samples."""
    equal_P: Tensor
    """Groups whose rewards are all equal before the entropy reward."""
    size_P: Tensor
    """Mean |A| of the group, without a mask."""


def run(
    *,
    recipe: str = "shapes_strict",
    trained: str = "",
    steps: PositiveInt = 4,
    overrides: str = "",
) -> BenchResult:
    """Draws and judges a recipe's first steps at the weights it begins with, and learns nothing.

    `trained`: RUN or RUN@STEP in place of a recipe: its own, with the policy that it had then
    beside its reference.
    `overrides` are settings as `stage train` takes them, with spaces between.
    """
    checkpoint = None
    if trained:
        source = find_source(trained)
        if source.run is None:
            raise InputError(f"--trained: {trained} is no run; write the folder of one")
        recipe, checkpoint = str(source.run / "recipe.json"), source.checkpoint
    loaded = load_recipe(recipe, ["probe.every=0", "run.log_images_every=0", *overrides.split()])
    trainer = build_trainer(loaded, loaded.prompts.build())
    if checkpoint is not None:
        trainer.restore(checkpoint)
    parts = [_look(trainer, without_update(trainer, step)) for step in range(steps)]
    return report(Tokens(*(torch.cat(values) for values in zip(*parts, strict=True))))


def _look(trainer: Trainer, step: Step) -> Tokens:
    learned = step.learned
    if learned is None or "mask/mean" not in learned.credit.metrics:
        raise InputError("its credit has no mask; name a recipe or a run of algorithm.credit=stage")
    (batch,) = micro_batches(step.rollout, None, trainer.policy.device)
    advantages_PG = learned.credit.advantages_PG
    slopes_PGTW = slopes(trainer, batch).unflatten(0, (-1, batch.group_size))
    inspections = inspect(step.rollout.images_NHWC.cpu().numpy())
    foreground_NHW = np.stack([one.foreground_HW for one in inspections])
    shown_NT = object_cells(foreground_NHW, trainer.policy.layout.grid).to(advantages_PG.device)
    objects_PGT = shown_NT.float().unflatten(0, (-1, batch.group_size))
    weight_PGT = learned.credit.advantages_PGT.abs()
    return Tokens(
        similarity_PT=learned.credit.metrics["similarity/mean"].mean(1),
        plain_PTK=_sums(slopes_PGTW * advantages_PG[:, :, None, None]),
        masked_PTK=_sums(slopes_PGTW * learned.credit.advantages_PGT[..., None]),
        objects_PT=objects_PGT.mean(1),
        background_PT=(weight_PGT * (1 - objects_PGT)).sum(1),
        advantage_PT=weight_PGT.sum(1),
        equal_P=equal_reward_groups(step.rewards.rewards_PG),
        size_P=advantages_PG.abs().mean(1),
    )


def _sums(gradients_PGTW: Tensor) -> Tensor:
    sizes_PGT = gradients_PGTW.norm(dim=-1)
    sums = (gradients_PGTW.sum(1).norm(dim=-1), sizes_PGT.sum(1), sizes_PGT.norm(dim=1))
    return torch.stack(sums, dim=-1)


def slopes(trainer: Trainer, batch: MicroBatch) -> Tensor:
    """d log pi(x_it) / d h_it of every token of a batch, NTW: a token's own row alone enters."""
    policy, precision = trainer.policy, trainer.precision
    with torch.no_grad(), policy.unsharded():
        states_NTW = policy.states(
            batch.prompts,
            batch.tokens_NT,
            group_size=batch.group_size,
            scoring=precision.scoring,
            mixed=precision.mixed,
        )
    rows_RW = states_NTW.flatten(0, 1).detach().requires_grad_()
    with policy.unsharded():
        logprobs_R, _ = head_logprobs(
            lambda some_RW: precision.scoring.logits(policy.head, some_RW),
            rows_RW,
            batch.tokens_NT.flatten(),
            chunk_rows=precision.logprob_rows,
            entropy_grad=False,
        )
        (slopes_RW,) = torch.autograd.grad(logprobs_R.sum(), rows_RW)
    return slopes_RW.float().view_as(states_NTW)


def report(tokens: Tokens) -> BenchResult:
    """Conflict by decile of similarity, on background and objects, and what is left by the mask."""
    decided_P = tokens.size_P > 0
    similarity_R, objects_R = (
        values_PT[decided_P].flatten() for values_PT in (tokens.similarity_PT, tokens.objects_PT)
    )
    plain_RK, masked_RK = (
        values_PTK[decided_P].flatten(0, 1) for values_PTK in (tokens.plain_PTK, tokens.masked_PTK)
    )
    deciles = similarity_R.argsort().tensor_split(NUM_PARTS)
    chosen = {f"decile_{part}": places for part, places in enumerate(deciles, start=1)}
    chosen["objects"] = (objects_R >= 0.5).nonzero().flatten()
    chosen["background"] = (objects_R < 0.5).nonzero().flatten()
    chosen["all"] = torch.cat(deciles)
    rows = {
        name: {
            "similarity": similarity_R[places].mean().item(),
            **conflict(plain_RK[places], "conflict", "unrelated"),
            **conflict(masked_RK[places], "masked", "masked_unrelated"),
        }
        for name, places in chosen.items()
    }
    share = (tokens.background_PT.sum() / tokens.advantage_PT.sum()).item()
    equal = tokens.equal_P.float().mean().item()
    measures = flat(rows) | {
        "background_tokens": 1 - tokens.objects_PT.mean().item(),
        "background_advantage_share": share,
        "equal_groups": equal,
    }
    lines = [
        f"background: {measures['background_tokens']:.3f} of the tokens, {share:.3f} of the masked "
        "advantage",
        f"groups of equal rewards: {equal:.3f}",
    ]
    if tokens.equal_P.any():
        measures["equal_group_advantage"] = tokens.size_P[tokens.equal_P].mean().item()
        lines[1] += f", mean |advantage| there {measures['equal_group_advantage']:.3f}"
    last, formats = rows[f"decile_{NUM_PARTS}"], dict.fromkeys(rows["all"], ".3f")
    return BenchResult(
        f"conflict {rows['all']['conflict']:.3f}, with the mask {rows['all']['masked']:.3f}; "
        f"most similar tenth {last['conflict']:.3f}, unrelated gradients {last['unrelated']:.3f}",
        last["conflict"] > last["unrelated"],
        measures,
        (*table(rows, formats), *lines),
    )


def conflict(sums_RK: Tensor, name: str, unrelated: str) -> dict[str, float]:
    """The conflict of some positions, by `name`, and that of gradients of the same sizes at right
    angles to each other; 0 without a gradient.
    """
    pull, size, root = sums_RK.sum(0).tolist()
    return {name: 1 - pull / size, unrelated: 1 - root / size} if size else {name: 0, unrelated: 0}
