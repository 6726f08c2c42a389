"""Token credit: from the rewards of a group to the advantage and the KL coefficient of each token.

`assign_credit` is all of it, from top to bottom. In its middle stands the function that
`algorithm.credit` names, a built-in one or `module:function`:

    def mine(inputs: CreditInputs, settings: AlgorithmConfig, **parameters) -> CreditOutputs: ...

`parameters` are those that the recipe writes beside the function's name, of the types that they are
annotated with. It is called with some whole groups at a time and without gradient, and must not
depend on which groups these are: then micro-batches and processes change no number.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.advantage import image_advantages
from stage_rl.objective.importance import importance_metrics, importance_weights
from stage_rl.objective.record import (
    CreditFunction,
    CreditInputs,
    CreditOutputs,
    MeasuredGroups,
)


@dataclass(frozen=True)
class TokenCredit:
    """What the loss of some groups is made with; constants."""

    advantages_PG: Tensor
    """Of the images: equation 2."""
    advantages_PGT: Tensor
    """Of the tokens, with importance weights."""
    kl_weight_PGT: Tensor
    """Factor of beta."""
    beta_PGT: Tensor
    """KL coefficient."""
    valid_P: Tensor
    """0 for groups that were dropped from the step, else 1."""
    equal_P: Tensor
    """Groups whose rewards were all equal before the entropy reward."""
    metrics: Mapping[str, Tensor]


@torch.no_grad()
def assign_credit(
    function: CreditFunction, groups: MeasuredGroups, settings: AlgorithmConfig
) -> TokenCredit:
    """From the rewards of some groups to the advantage and the KL coefficient of each token.

    `function` is that of `algorithm.credit`. Weights of another shape, or that are not finite, are
    a RecipeError.
    """
    # Equations 2 and 10 to 12: an image is worth what it is better than the others of its group.
    images = image_advantages(groups, settings)

    # Equations 5 to 8 and section 3.2, or another function: what of it each token gets.
    inputs = CreditInputs(
        rewards_PG=images.rewards_PG,
        advantages_PG=images.advantages_PG,
        equal_P=images.equal_P,
        **vars(groups),
    )
    weights = function(inputs, settings)
    _check(weights, inputs)
    metrics = {
        **credit_metrics(weights, images.advantages_PG, groups.token_mask_PGT),
        **weights.metrics,
    }

    # Groups of equal rewards keep the terms that the recipe says; dropped ones keep none.
    factors = algorithm.equal_group_factors(images.equal_P, settings.equal_reward_groups)
    policy_P, kl_P = factors.policy_P * groups.valid_P, factors.kl_P * groups.valid_P
    advantages_PGT = algorithm.reweight_advantages(
        images.advantages_PG * policy_P[:, None], weights.policy_PGT
    )
    if weights.bonus_PGT is not None:
        advantages_PGT = advantages_PGT + weights.bonus_PGT * policy_P[:, None, None]
    kl_weight_PGT = weights.kl_PGT * kl_P[:, None, None]

    # Losses scale with the size of the advantage and no weight is below 0: it goes in there.
    if settings.importance_sampling != "none":
        sampler_PGT = groups.sampler_logprobs_PGT
        assert sampler_PGT is not None, "the rollout holds no log-probabilities of the sampler"
        mask_PGT = groups.token_mask_PGT
        importance_PGT = importance_weights(groups.logprobs_PGT, sampler_PGT, settings, mask_PGT)
        advantages_PGT = advantages_PGT * importance_PGT
        metrics |= importance_metrics(importance_PGT, settings, mask_PGT)
    return TokenCredit(
        images.advantages_PG,
        advantages_PGT,
        kl_weight_PGT,
        beta_PGT=settings.beta * kl_weight_PGT,
        valid_P=groups.valid_P,
        equal_P=images.equal_P,
        metrics={**metrics, **images.metrics},
    )


def credit_metrics(
    weights: CreditOutputs, advantages_PG: Tensor, token_mask_PGT: Tensor | None = None
) -> dict[str, Tensor]:
    """How unevenly an image's tokens that count are credited, PG by metric name.

    credit/ess: (sum w)^2 / (T sum w^2); credit/top_tenth: what the most credited tenth of the
    tokens has of the sizes of all advantages, or of all weights where the image has no advantage;
    credit/zero: share of tokens without any; credit/policy_weight: mean size of the weight, which
    the paper's dynamic weight of `critical` alone makes negative.
    """
    policy_PGT = weights.policy_PGT
    num_tokens: Tensor | int = policy_PGT.shape[-1]
    if token_mask_PGT is not None:
        policy_PGT, num_tokens = policy_PGT * token_mask_PGT, token_mask_PGT.sum(-1)
    tiny = torch.finfo(policy_PGT.dtype).tiny
    squares_PG = policy_PGT.square().sum(-1)
    size_PGT = algorithm.reweight_advantages(advantages_PG, policy_PGT)
    if weights.bonus_PGT is not None:
        size_PGT = size_PGT + weights.bonus_PGT
    size_PGT = torch.where((advantages_PG == 0)[:, :, None], policy_PGT, size_PGT).abs()
    if token_mask_PGT is not None:
        size_PGT = size_PGT * token_mask_PGT
    top_PG = _largest_tenth(size_PGT, token_mask_PGT)
    return {
        "credit/ess": policy_PGT.sum(-1).square() / (num_tokens * squares_PG).clamp_min(tiny),
        "credit/top_tenth": top_PG / size_PGT.sum(-1).clamp_min(tiny),
        "credit/zero": algorithm.image_mean((size_PGT == 0).to(policy_PGT), token_mask_PGT),
        "credit/policy_weight": algorithm.image_mean(policy_PGT.abs(), token_mask_PGT),
    }


def _largest_tenth(size_PGT: Tensor, token_mask_PGT: Tensor | None) -> Tensor:
    """Sum over the tenth of an image's tokens, rounded up, of the largest size, PG."""
    num_tokens = size_PGT.shape[-1]
    if token_mask_PGT is None:
        return size_PGT.topk(math.ceil(num_tokens / 10)).values.sum(-1)
    sorted_PGT = size_PGT.sort(descending=True).values
    tenth_PG1 = (token_mask_PGT.sum(-1, keepdim=True) / 10).ceil()
    return (sorted_PGT * (torch.arange(num_tokens).to(tenth_PG1) < tenth_PG1)).sum(-1)


def _check(weights: CreditOutputs, inputs: CreditInputs) -> None:
    where = "algorithm.credit: the function returned"
    if not isinstance(weights, CreditOutputs):
        raise RecipeError(f"{where} {type(weights).__name__}; return CreditOutputs")
    shape = inputs.logprobs_PGT.shape
    for part in ("policy_PGT", "kl_PGT", "bonus_PGT"):
        value = getattr(weights, part)
        if value is not None and (value.shape != shape or not value.isfinite().all()):
            raise RecipeError(
                f"{where} {part} of shape {tuple(value.shape)}; return finite numbers of shape "
                f"{tuple(shape)}, one per token"
            )
    for metric, value in weights.metrics.items():
        if value.shape[:1] != shape[:1]:
            raise RecipeError(
                f"{where} the metric {metric} of shape {tuple(value.shape)}; return one row for "
                f"each of the {shape[0]} groups"
            )
