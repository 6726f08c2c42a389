"""Dynamic sampling: groups whose rewards are all equal are drawn again, up to a cap.

Such a group has no advantage to learn from. A new draw has streams of its own, keyed by the step,
the attempt, the prompt and the image, so it is the same after a resume and on any rank.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups
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


def resample(trainer: Trainer, rollout: Rollout, rewards: Rewards, *, step: int) -> Resampled:
    """`resample_groups` of this rank's part of a step; all ranks call it."""

    def draw(prompts: Sequence[Prompt], key: int) -> Rollout:
        trainer.ranks.any_of(len(prompts))
        return trainer.sample(trainer.engine, prompts, step=key)

    resampled = resample_groups(
        rollout,
        rewards,
        step=step,
        cap=trainer.recipe.rollout.resample_equal_groups,
        draw=draw,
        score=trainer.rewards.score,
    )
    # A draw gathers shards of all ranks: those that need no more draw along with the others.
    while trainer.ranks.any_of(None):
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
    fails on a new draw, the first draw stays. Groups that left the step are not drawn again.
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
        moves = [(place, new) for new, place in enumerate(places) if differs_P[new]]
        rollout = _with_groups(rollout, again, moves)
        rewards = _with_rewards(rewards, scored, moves)
    numbers = {"resample/groups": float(num_drawn)}
    if first.valid_P.any():
        rewards_PG = first.rewards_PG[first.valid_P]
        equal_P = equal_reward_groups(rewards_PG)
        numbers["resample/first_reward"] = rewards_PG.mean().item()
        numbers["resample/first_equal_groups"] = equal_P.float().mean().item()
    return Resampled(rollout, rewards, numbers)


Moves = Sequence[tuple[int, int]]
"""(place, new): group `new` of the later draw takes the place of group `place`."""


def _with_groups(rollout: Rollout, again: Rollout, moves: Moves) -> Rollout:
    names = ("tokens_NT", "images_NHWC", "logprobs_NT", "guided_logprobs_NT", "entropy_NT")
    pairs = {name: (getattr(rollout, name), getattr(again, name)) for name in names}
    return replace(
        rollout,
        **{
            name: _moved(values, others, moves, rows=rollout.group_size)
            for name, (values, others) in pairs.items()
            if values is not None and others is not None
        },
    )


def _with_rewards(rewards: Rewards, again: Rewards, moves: Moves) -> Rewards:
    size = rewards.rewards_PG.shape[1]
    reasons = list(rewards.reasons)
    for place, new in moves:
        reasons[place * size : (place + 1) * size] = again.reasons[new * size : (new + 1) * size]
    return replace(
        rewards,
        rewards_PG=_moved(rewards.rewards_PG, again.rewards_PG, moves),
        columns=_moved_columns(rewards, again, moves),
        reasons=tuple(reasons),
    )


def _moved_columns(rewards: Rewards, again: Rewards, moves: Moves) -> Mapping[str, Tensor]:
    """The columns of both; a part of a score may be in one of them alone, then NaN."""
    nothing_PG = torch.full_like(rewards.rewards_PG, math.nan)
    none_PG = torch.full_like(again.rewards_PG, math.nan)
    return {
        name: _moved(rewards.columns.get(name, nothing_PG), again.columns.get(name, none_PG), moves)
        for name in dict.fromkeys([*rewards.columns, *again.columns])
    }


def _moved(values: Tensor, others: Tensor, moves: Moves, *, rows: int = 1) -> Tensor:
    """The values with `rows` rows for each group that moves."""
    values = values.clone()
    for place, new in moves:
        values[place * rows : (place + 1) * rows] = others[new * rows : (new + 1) * rows]
    return values
