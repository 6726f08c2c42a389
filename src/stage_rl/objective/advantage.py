"""The advantage of each image: what it is better by than the others of its group.

One reward or a weighted sum of several is normalized once (equation 2); `algorithm.advantage: gdpo`
normalizes each reward by itself. The entropy reward (equations 10 to 12) comes with either.

Shape suffixes: P prompts, G group, B all images of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.record import MeasuredGroups, RewardTerms
from stage_rl.types import Rewards


@dataclass(frozen=True)
class ImageAdvantages:
    """Of some groups."""

    rewards_PG: Tensor
    """What the images are compared by."""
    advantages_PG: Tensor
    equal_P: Tensor
    """Groups whose rewards were all equal before the entropy reward."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """One row per group."""


def image_advantages(groups: MeasuredGroups, settings: AlgorithmConfig) -> ImageAdvantages:
    """By the sum of the rewards, or by the terms of each where the groups have them."""
    if groups.terms is not None:
        return _by_terms(groups, groups.terms, settings)
    summed_PG, scale = groups.summed_rewards_PG, settings.entropy.scale
    rewards_PG = summed_PG
    bonus_PG = _entropy_bonus(groups, summed_PG, settings)
    if bonus_PG is not None:
        rewards_PG = summed_PG + scale * bonus_PG
    advantages_PG = _normalized(rewards_PG, settings)
    metrics = {}
    if settings.entropy.mode == "reward":
        share_P = entropy_share(summed_PG, rewards_PG, advantages_PG, settings)
        metrics["entropy/advantage_share"] = share_P
    equal_P = algorithm.equal_reward_groups(summed_PG)
    return ImageAdvantages(rewards_PG, advantages_PG, equal_P, metrics)


def reward_terms(rewards: Rewards, settings: AlgorithmConfig) -> RewardTerms | None:
    """GDPO (arXiv 2601.05242), equations 4, 6 and 7: every reward is normalized within the group,
    then they are weighted and added, and all is divided by the deviation over the step.

    `rewards` are those of the whole step, on all ranks: it is one number from rewards alone. The
    mean over the step is 0, since that of every group is. None where a sum is asked for, and for a
    single reward, for which both are the same but for that division.
    """
    weights = {name: weight for name, weight in rewards.weights.items() if weight}
    if settings.advantage != "gdpo" or len(weights) < 2:
        return None
    terms = {}
    for name, weight in weights.items():
        component_PG = rewards.components[name]
        applies_P1 = component_PG.isfinite().all(1, keepdim=True)
        known_PG = torch.where(applies_P1, component_PG, 0.0)
        terms[name] = weight * _normalized(known_PG, settings)
    kept_B = torch.stack([*terms.values()]).sum(0)[rewards.valid_P].flatten()
    std = kept_B.std() if len(kept_B) > 1 else kept_B.new_zeros(())
    divisor = std + settings.advantage_eps if settings.whiten == "batch" else 1.0
    return RewardTerms(
        {name: term_PG / divisor for name, term_PG in terms.items()},
        std.expand(len(rewards.valid_P)),
    )


def _by_terms(
    groups: MeasuredGroups, terms: RewardTerms, settings: AlgorithmConfig
) -> ImageAdvantages:
    """The entropy reward is one more term: normalized within the group, then scaled."""
    metrics = {"gdpo/std": terms.std_P}
    stacked_KPG = torch.stack([*terms.by_reward.values()])
    total_PG = stacked_KPG.sum(0)
    advantages_PG = total_PG
    bonus_PG = _entropy_bonus(groups, total_PG, settings)
    if bonus_PG is not None:
        scale = settings.entropy.scale
        advantages_PG = total_PG + scale * _normalized(bonus_PG, settings)
        if settings.entropy.mode == "reward":
            even_PG = total_PG + scale * _normalized(_even(bonus_PG), settings)
            metrics["entropy/advantage_share"] = _changed_share(advantages_PG, even_PG)
    size_KPG = stacked_KPG.abs()
    share_KPG = size_KPG / size_KPG.sum(0).clamp_min(torch.finfo(size_KPG.dtype).tiny)
    for name, share_PG in zip(terms.by_reward, share_KPG, strict=True):
        metrics[f"gdpo/{name}_share"] = share_PG
    equal_P = algorithm.equal_reward_groups(total_PG)
    return ImageAdvantages(advantages_PG, advantages_PG, equal_P, metrics)


def _normalized(rewards_PG: Tensor, settings: AlgorithmConfig) -> Tensor:
    """Equation 2; for Dr.GRPO (arXiv 2503.20783) without the division."""
    if settings.loss_kind == "dr_grpo":
        centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
        return centred_PG.masked_fill(algorithm.equal_reward_groups(rewards_PG)[:, None], 0.0)
    return algorithm.group_advantages(
        rewards_PG, settings.advantage_eps, settings.advantage_std_floor
    )


def _entropy_bonus(
    groups: MeasuredGroups, rewards_PG: Tensor, settings: AlgorithmConfig
) -> Tensor | None:
    """Equations 10 to 12: the best images get a bonus for an entropy near the reference's, PG,
    before it is scaled; None where the recipe has no such reward.
    """
    entropy = settings.entropy
    if entropy.mode not in ("reward", "constant"):
        return None
    bonus_PG = torch.ones_like(rewards_PG)
    if entropy.mode == "reward":
        bonus_PG = algorithm.entropy_bonus(
            algorithm.completion_entropy(groups.entropy_PGT, groups.token_mask_PGT),
            algorithm.completion_entropy(groups.ref_entropy_PGT, groups.token_mask_PGT),
        )
    return algorithm.award_bonus(rewards_PG, bonus_PG, scope=entropy.scope, centred=entropy.centred)


def entropy_share(
    rewards_PG: Tensor, with_bonus_PG: Tensor, advantages_PG: Tensor, settings: AlgorithmConfig
) -> Tensor:
    """The part of each group's advantages that differences of entropy make, share_P.

    The advantages are compared with those of a bonus that is the same, its mean, for all samples
    that get one: sum of |difference| over sum of |advantage|; 0 for a group without advantages.
    """
    even_PG = _normalized(rewards_PG + _even(with_bonus_PG - rewards_PG), settings)
    return _changed_share(advantages_PG, even_PG)


def _even(bonus_PG: Tensor) -> Tensor:
    """The mean bonus of the samples that get one, for each of them."""
    chosen_PG = bonus_PG != 0
    mean_P1 = bonus_PG.sum(1, keepdim=True) / chosen_PG.sum(1, keepdim=True).clamp_min(1)
    return torch.where(chosen_PG, mean_P1, 0.0)


def _changed_share(advantages_PG: Tensor, others_PG: Tensor) -> Tensor:
    """Sum of |difference| over sum of |advantage| of each group, 0 for one without advantages."""
    size_P = advantages_PG.abs().sum(1)
    difference_P = (advantages_PG - others_PG).abs().sum(1)
    return torch.where(size_P > 0, difference_P / size_P.clamp_min(1e-12), 0.0)
