"""Importance weights for a sampler whose arithmetic is not the trainer's.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_rl.algorithm import image_mean
from stage_rl.algorithm_config import AlgorithmConfig


def importance_weights(
    logprobs_PGT: Tensor,
    sampler_PGT: Tensor,
    settings: AlgorithmConfig,
    token_mask_PGT: Tensor | None = None,
) -> Tensor:
    """A constant weight of the policy term of each token, PGT, from rho = exp(trainer's - sampler's
    log-probability), both under the scored distribution.

    token_*: of rho itself; sequence_*: of its product over the image; geometric_mask: of its
    geometric mean. truncate: min(rho, importance_cap) (Ionides 2008,
    doi:10.1198/106186008X320456); mask: rho, and 0 outside [importance_floor, importance_cap], for
    the geometric mean 1 or 0. Tokens that do not count are in no product and no mean.
    """
    level, _, rule = settings.importance_sampling.partition("_")
    log_ratio_PGT = (logprobs_PGT - sampler_PGT).detach()
    if token_mask_PGT is not None:
        log_ratio_PGT = torch.where(token_mask_PGT, log_ratio_PGT, 0.0)
    if level == "sequence":
        log_ratio_PGT = log_ratio_PGT.sum(-1, keepdim=True).expand_as(log_ratio_PGT)
    elif level == "geometric":
        mean_PG1 = image_mean(log_ratio_PGT, token_mask_PGT)[..., None]
        log_ratio_PGT = mean_PG1.expand_as(log_ratio_PGT)
    ratio_PGT = log_ratio_PGT.exp()
    if rule == "truncate":
        return ratio_PGT.clamp_max(settings.importance_cap)
    low, high = settings.importance_floor, settings.importance_cap
    within_PGT = (ratio_PGT >= low) & (ratio_PGT <= high)
    kept_PGT = torch.ones_like(ratio_PGT) if level == "geometric" else ratio_PGT
    return torch.where(within_PGT, kept_PGT, 0.0)


def importance_metrics(
    weight_PGT: Tensor, settings: AlgorithmConfig, token_mask_PGT: Tensor | None = None
) -> dict[str, Tensor]:
    """importance/weight, the mean; importance/ess, (sum w)^2 / (n sum w^2) of a group's tokens;
    importance/cut, the share of tokens that are at the cap, or masked. Of the tokens that count.
    """
    masks = settings.importance_sampling.endswith("mask")
    cut_PGT = weight_PGT == (0 if masks else settings.importance_cap)
    counts_PGT = torch.ones_like(cut_PGT) if token_mask_PGT is None else token_mask_PGT
    num_P = counts_PGT.sum((1, 2))
    weight_PGT = weight_PGT * counts_PGT
    sum_P, squares_P = weight_PGT.sum((1, 2)), weight_PGT.square().sum((1, 2))
    tiny = torch.finfo(weight_PGT.dtype).tiny
    return {
        "importance/weight": sum_P / num_P,
        "importance/ess": sum_P.square() / (num_P * squares_P).clamp_min(tiny),
        "importance/cut": (cut_PGT & counts_PGT).sum((1, 2)) / num_P,
    }
