"""Dynamic sampling: groups whose rewards are all equal are drawn again, up to a cap.

Such a group has no advantage to learn from. A new draw has streams of its own, keyed by the step,
the attempt, the prompt and the image, so it is the same after a resume and on any rank.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
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
    """Metrics of what was drawn and what the first draws said."""


def resample(
    trainer: Trainer, rollout: Rollout, verdict: Future[Rewards], *, step: int
) -> tuple[Rollout, Future[Rewards], dict[str, float]]:
    """The rollout that a step learns from, its verdict (already there), metrics of the draws."""

    def draw(prompts: Sequence[Prompt], key: int) -> Rollout:
        trainer.ranks.any_of(len(prompts))
        return trainer.sample(trainer.engine, prompts, step=key)

    resampled = resample_groups(
        rollout,
        verdict.result(),
        step=step,
        cap=trainer.recipe.rollout.resample_equal_groups,
        draw=draw,
        score=trainer.rewards.score,
    )
    # A draw gathers shards of all ranks: those that need no more draw along with the others.
    while trainer.ranks.any_of(None):
        trainer.sample(trainer.engine, rollout.prompts[:1], step=step, group_size=1)
    judged: Future[Rewards] = Future()
    judged.set_result(resampled.rewards)
    return resampled.rollout, judged, resampled.numbers


def resample_groups(
    rollout: Rollout,
    judged: Rewards,
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
    first, num_drawn = judged, 0
    for attempt in range(1, cap + 1):
        places = _equal_places(judged)
        if not places:
            break
        num_drawn += len(places)
        prompts = tuple(rollout.prompts[place] for place in places)
        again = draw(prompts, step + attempt * ATTEMPT_STRIDE)
        verdict = score(again)
        differs_P = verdict.valid_P & ~equal_reward_groups(verdict.rewards_PG)
        taken = [(place, new) for new, place in enumerate(places) if differs_P[new]]
        rollout = _with_groups(rollout, again, taken)
        judged = _with_verdicts(judged, verdict, taken, rollout.group_size)
    numbers = {"resample/groups": float(num_drawn)}
    if first.valid_P.any():
        rewards_PG = first.rewards_PG[first.valid_P]
        numbers["resample/first_reward"] = rewards_PG.mean().item()
        numbers["resample/first_equal_groups"] = (
            equal_reward_groups(rewards_PG).float().mean().item()
        )
    return Resampled(rollout, judged, numbers)


def _equal_places(judged: Rewards) -> list[int]:
    equal_P = equal_reward_groups(judged.rewards_PG) & judged.valid_P
    return equal_P.nonzero().flatten().tolist()


def _with_groups(rollout: Rollout, again: Rollout, taken: Sequence[tuple[int, int]]) -> Rollout:
    """The rollout with group `new` of another in each `place`."""
    size = rollout.group_size

    def mixed(values: Tensor | None, others: Tensor | None) -> Tensor | None:
        if values is None or others is None:
            return values
        values = values.clone()
        for place, new in taken:
            values[place * size : (place + 1) * size] = others[new * size : (new + 1) * size]
        return values

    tokens_NT, images_NHWC = (
        mixed(getattr(rollout, name), getattr(again, name)) for name in ("tokens_NT", "images_NHWC")
    )
    assert tokens_NT is not None
    assert images_NHWC is not None
    return replace(
        rollout,
        tokens_NT=tokens_NT,
        images_NHWC=images_NHWC,
        logprobs_NT=mixed(rollout.logprobs_NT, again.logprobs_NT),
        guided_logprobs_NT=mixed(rollout.guided_logprobs_NT, again.guided_logprobs_NT),
        entropy_NT=mixed(rollout.entropy_NT, again.entropy_NT),
    )


def _with_verdicts(
    judged: Rewards, verdict: Rewards, taken: Sequence[tuple[int, int]], size: int
) -> Rewards:
    rewards_PG, reasons = judged.rewards_PG.clone(), list(judged.reasons)
    for place, new in taken:
        rewards_PG[place] = verdict.rewards_PG[new]
        reasons[place * size : (place + 1) * size] = verdict.reasons[new * size : (new + 1) * size]
    columns = _columns(judged.columns, verdict.columns, taken, rewards_PG)
    return Rewards(rewards_PG, judged.valid_P, columns, tuple(reasons))


def _columns(
    columns: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    taken: Sequence[tuple[int, int]],
    like_PG: Tensor,
) -> dict[str, Tensor]:
    """Both judgements' columns; a part of a score may be in one of them alone, then NaN."""
    nothing_PG = torch.full_like(like_PG, math.nan)
    mixed = {}
    for name in dict.fromkeys([*columns, *others]):
        mixed[name] = columns.get(name, nothing_PG).clone()
        for place, new in taken:
            mixed[name][place] = others[name][new] if name in others else math.nan
    return mixed
