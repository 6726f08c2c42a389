"""Dynamic sampling: groups whose rewards are all equal are drawn again, up to a cap.

Such a group has no advantage to learn from. A new draw has streams of its own, keyed by the step,
the attempt, the prompt and the image, so it is the same after a resume and on any rank.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups
from stage_rl.distributed import concat
from stage_rl.training.trainer import Trainer
from stage_rl.types import Prompt, Rewards, Rollout

ATTEMPT_STRIDE = 2**41
"""Between the streams of two attempts lie more steps than any run has, and those of the probe."""

Draw = Callable[[Sequence[Prompt], int], Rollout]
"""(prompts, number that keys their streams as a step does) -> a group for each prompt."""


class Resampled(NamedTuple):
    """A rollout whose equal-reward groups were drawn again."""

    rollout: Rollout
    rewards: Rewards
    numbers: dict[str, float]
    """Metrics of what was drawn and what the rewards said of the first draws."""


def resample(
    trainer: Trainer,
    rollout: Rollout,
    rewards: Rewards,
    *,
    step: int,
    score: Callable[[Rollout], Rewards],
) -> Resampled:
    """`resample_groups` of this rank's part of a step; all ranks call it."""

    def draw(prompts: Sequence[Prompt], key: int) -> Rollout:
        trainer.world.any_of(len(prompts))
        return trainer.sample(trainer.engine, prompts, step=key)

    resampled = resample_groups(
        rollout,
        rewards,
        step=step,
        cap=trainer.recipe.rollout.resample_equal_groups,
        draw=draw,
        score=score,
    )
    # A draw gathers shards of all ranks: those that need no more draw along with the others.
    while trainer.world.any_of(None):
        trainer.sample(trainer.engine, rollout.prompts[:1], step=step, group_size=1)
    return resampled


def resample_groups(
    rollout: Rollout,
    rewards: Rewards,
    *,
    step: int,
    cap: int,
    draw: Draw,
    score: Callable[[Rollout], Rewards],
) -> Resampled:
    """Draws groups of equal rewards again, at most `cap` times each.

    A group is replaced by its first draw whose rewards differ. Where none does, and where a reward
    fails on a new draw, the first draw stays. Groups dropped from the step are not drawn again.
    """
    first, num_drawn = rewards, 0
    for attempt in range(1, cap + 1):
        equal_P = equal_reward_groups(rewards.rewards_PG) & rewards.valid_P
        places = equal_P.nonzero().flatten().tolist()
        if not places:
            break
        num_drawn += len(places)
        prompts = tuple(rollout.prompts[place] for place in places)
        again = draw(prompts, step + attempt * ATTEMPT_STRIDE)
        scored = score(again)
        differs_P = scored.valid_P & ~equal_reward_groups(scored.rewards_PG)
        # Behind the groups of the rollout lie those of the new draw, which may take their places.
        groups = list(range(len(rollout.prompts)))
        for new, place in enumerate(places):
            if differs_P[new]:
                groups[place] = len(groups) + new
        rollout = _groups_of(concat([rollout, again]), groups)
        names = dict.fromkeys([*rewards.columns, *scored.columns])
        both = [_with_columns(part, names) for part in (rewards, scored)]
        rewards = _rewards_of(concat(both), groups)
    numbers = {"resample/groups": float(num_drawn)}
    if first.valid_P.any():
        rewards_PG = first.rewards_PG[first.valid_P]
        equal_P = equal_reward_groups(rewards_PG)
        numbers["resample/first_reward"] = rewards_PG.mean().item()
        numbers["resample/first_equal_groups"] = equal_P.float().mean().item()
    return Resampled(rollout, rewards, numbers)


def _groups_of(rollout: Rollout, groups: Sequence[int]) -> Rollout:
    size = rollout.group_size
    rows = [group * size + image for group in groups for image in range(size)]
    tensors = {name: v[rows] for name, v in vars(rollout).items() if isinstance(v, Tensor)}
    return replace(rollout, prompts=tuple(rollout.prompts[group] for group in groups), **tensors)


def _with_columns(rewards: Rewards, names: Iterable[str]) -> Rewards:
    """A part of a score may be in one of two draws alone; in the other it is NaN."""
    nothing_PG = torch.full_like(rewards.rewards_PG, math.nan)
    return replace(rewards, columns={n: rewards.columns.get(n, nothing_PG) for n in names})


def _rewards_of(rewards: Rewards, groups: Sequence[int]) -> Rewards:
    size = rewards.rewards_PG.shape[1]
    reasons = (rewards.reasons[group * size : (group + 1) * size] for group in groups)
    return Rewards(
        rewards.rewards_PG[groups],
        rewards.valid_P[groups],
        {name: column_PG[groups] for name, column_PG in rewards.columns.items()},
        tuple(chain.from_iterable(reasons)),
        {name: component_PG[groups] for name, component_PG in rewards.components.items()},
        rewards.weights,
    )
