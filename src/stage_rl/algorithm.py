"""The STAGE objective, equation by equation; every function is pure.

The numbers are those of arXiv 2509.25027. Where paper and released code differ, each reading is a
coefficient or a function of its own. The gradient flows through log-probabilities and the entropy
penalty only: rewards, advantages, similarities and masks are constants.

Shape suffixes: P prompts, G group, T image tokens, C codebook channels, V codebook size.
Log-probabilities, entropies and divergences are in nats.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stage_rl.vector_math import choose_kernels

choose_kernels()

EqualGroupHandling = Literal["keep", "drop_policy", "drop_kl", "drop_all"]


class GroupFactors(NamedTuple):
    """What a group's advantages and its beta are multiplied by, each 0 or 1."""

    policy_P: Tensor
    kl_P: Tensor


class GrpoLoss(NamedTuple):
    """The loss and its parts, scalars; total = policy + kl."""

    total: Tensor
    policy: Tensor
    kl: Tensor
    """Mean of beta times the per-token divergence."""
    clip_fraction: Tensor
    """Share of tokens whose ratio the clip holds back, in [0, 1]."""


def image_mean(values_PGT: Tensor, mask_PGT: Tensor | None = None) -> Tensor:
    """Mean over the tokens of each image, PG. `mask_PGT` (bool) says which of them count, None all;
    an image without any has 0.
    """
    if mask_PGT is None:
        return values_PGT.mean(dim=-1)
    counted_PGT = torch.where(mask_PGT, values_PGT, 0.0)
    return counted_PGT.sum(dim=-1) / mask_PGT.sum(dim=-1).clamp_min(1)


def token_mean(values_PGT: Tensor, mask_PGT: Tensor | None = None) -> Tensor:
    """The mean of equation 3, over the tokens of each image and then over images, a scalar;
    `mask_PGT` as in `image_mean`.
    """
    # Where every image has T tokens one mean is both.
    return values_PGT.mean() if mask_PGT is None else image_mean(values_PGT, mask_PGT).mean()


def group_advantages(rewards_PG: Tensor, eps: float = 1e-4, std_floor: float = 0.0) -> Tensor:
    """Equation 2: advantages_PG = (R - mean) / (max(std, std_floor) + eps) within each group.

    The standard deviation is unbiased. Where all rewards of a group are equal, exactly 0.
    """
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    # By hand, so that a group of one gives 0 and not NaN.
    variance_P1 = centred_PG.square().sum(dim=1, keepdim=True) / max(rewards_PG.shape[1] - 1, 1)
    advantages_PG = centred_PG / (variance_P1.sqrt().clamp_min(std_floor) + eps)
    # The mean of equal numbers may differ from them in the last bit, which eps would blow up.
    return advantages_PG.masked_fill(equal_reward_groups(rewards_PG)[:, None], 0.0)


def equal_reward_groups(rewards_PG: Tensor) -> Tensor:
    """The groups whose rewards are all equal, equal_P (bool)."""
    return rewards_PG.amax(dim=1) == rewards_PG.amin(dim=1)


def equal_group_factors(equal_P: Tensor, handling: EqualGroupHandling = "keep") -> GroupFactors:
    """Which terms of the loss the equal-reward groups keep: 0 where a term is dropped, else 1.

    The paper's ablations "w/o KL" and "w/o Ent & KL" are `drop_kl`.
    """
    assert handling in ("keep", "drop_policy", "drop_kl", "drop_all"), handling
    valid_P = (~equal_P).float()
    all_P = torch.ones_like(valid_P)
    return GroupFactors(
        policy_P=valid_P if handling in ("drop_policy", "drop_all") else all_P,
        kl_P=valid_P if handling in ("drop_kl", "drop_all") else all_P,
    )


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Equation 4: exp(log pi - log pi_old), of the inputs' shape.

    With `old_logprobs = logprobs.detach()` it is 1 and carries the policy gradient.
    """
    return torch.exp(logprobs - old_logprobs)


def opposing_similarity(
    codes_PGTC: Tensor, advantages_PG: Tensor, *, self_similarity: float | None = None
) -> Tensor:
    """Equations 5 and 6: sim_PGT in [-1, 1], the mean cosine of a token's codebook vector with
    those at its position in the completions j of the group with A_i A_j <= 0.

    The condition holds for j = i where A_i = 0: with `self_similarity` None, i is left out all the
    same; a number counts it with that cosine (paper: 1, released code: 0). No opponent: 0.
    """
    norm_PGT1 = torch.linalg.vector_norm(codes_PGTC, dim=-1, keepdim=True)
    unit_PGTC = codes_PGTC / norm_PGT1.clamp_min(torch.finfo(codes_PGTC.dtype).tiny)
    products_PGG = advantages_PG.unsqueeze(2) * advantages_PG.unsqueeze(1)
    products_PGG.diagonal(dim1=1, dim2=2).fill_(1)
    # In place, the comparison gives the weights 1 and 0 in the dtype of the product.
    weight_PGG = products_PGG.le_(0).to(unit_PGTC.dtype)
    count_PG1 = weight_PGG.sum(dim=2, keepdim=True)
    # The sum of cosines with many vectors is the dot product with the sum of their unit vectors.
    opponents_PGTC = torch.bmm(weight_PGG, unit_PGTC.flatten(2)).view_as(unit_PGTC)
    sum_PGT = (unit_PGTC * opponents_PGTC).sum(dim=-1)
    if self_similarity is not None:
        own_PG1 = (advantages_PG == 0).to(sum_PGT.dtype)[:, :, None]
        sum_PGT = sum_PGT + self_similarity * own_PG1
        count_PG1 = count_PG1 + own_PG1
    return sum_PGT / count_PG1.clamp_min(1)


def equal_group_similarity(sim_PGT: Tensor, equal_P: Tensor, value: float = 1.0) -> Tensor:
    """Similarities with those of equal-reward groups set to `value`.

    The released code sets 1 where it has no entropy reward: mask 0 and KL weight a + b.
    """
    return sim_PGT.masked_fill(equal_P[:, None, None], value)


def advantage_mask(sim_PGT: Tensor) -> Tensor:
    """Equation 7: mask_PGT = (1 - sim) / 2, clamped to [0, 1]."""
    return ((1 - sim_PGT) / 2).clamp(0, 1)


def normalize_mask(
    mask_PGT: Tensor, eps: float = 1e-6, *, token_mask_PGT: Tensor | None = None
) -> Tensor:
    """The mask divided by its mean over the group, so that less similar tokens are amplified.

    For one group this is the released code's division by the sum of the mask; `eps` is added to
    that sum, so a mask of zeros stays 0. `token_mask_PGT` says which tokens count, as in
    `image_mean`; the others get 0.
    """
    num_tokens: Tensor | int = mask_PGT.shape[1] * mask_PGT.shape[2]
    if token_mask_PGT is not None:
        mask_PGT = mask_PGT * token_mask_PGT
        num_tokens = token_mask_PGT.sum(dim=(1, 2), keepdim=True)
    return mask_PGT * (num_tokens / (mask_PGT.sum(dim=(1, 2), keepdim=True) + eps))


def reweight_advantages(advantages_PG: Tensor, mask_PGT: Tensor) -> Tensor:
    """Equation 8: advantages_PGT = mask x advantage."""
    return advantages_PG[:, :, None] * mask_PGT


def kl_weight(
    sim_PGT: Tensor,
    a: float = 0.5,
    b: float = 0.5,
    *,
    weight_clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Section 3.2: the per-token factor of beta, a + b x clip(sim + 1, *weight_clip), PGT."""
    return a + b * (sim_PGT + 1).clamp(*weight_clip)


def token_entropy(logits: Tensor) -> Tensor:
    """Equation 9: entropy over the last axis of finite logits, which it removes; in [0, ln V]."""
    logprobs = logits.log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)


def completion_entropy(entropy_PGT: Tensor, mask_PGT: Tensor | None = None) -> Tensor:
    """Equation 10: mean entropy over the tokens of each completion that count, entropy_PG."""
    return image_mean(entropy_PGT, mask_PGT)


def entropy_bonus(entropy_PG: Tensor, ref_entropy_PG: Tensor) -> Tensor:
    """Equation 11: 1 / (1 + (H_ref - H)^2) in (0, 1], PG; a reward, hence without gradient."""
    return 1 / (1 + (ref_entropy_PG - entropy_PG).detach().square())


def add_entropy_bonus(
    rewards_PG: Tensor,
    bonus_PG: Tensor,
    scale: float,
    *,
    scope: Literal["best", "all"] = "best",
    centred: bool = False,
) -> Tensor:
    """Equation 12: rewards_PG plus scale x bonus, for the completions that share their group's best
    reward or for all.

    `centred` first subtracts the mean of the bonus over those completions, as the released code
    does: a single best completion then gains exactly 0.
    """
    awarded_PG = award_bonus(rewards_PG, bonus_PG, scope=scope, centred=centred)
    return rewards_PG + scale * awarded_PG


def award_bonus(
    rewards_PG: Tensor,
    bonus_PG: Tensor,
    *,
    scope: Literal["best", "all"] = "best",
    centred: bool = False,
) -> Tensor:
    """The bonus of those completions that get one in equation 12, 0 for the others, PG."""
    assert scope in ("best", "all"), scope
    chosen_PG = torch.ones_like(rewards_PG, dtype=torch.bool)
    if scope == "best":
        chosen_PG = rewards_PG == rewards_PG.amax(dim=1, keepdim=True)
    bonus_PG = torch.where(chosen_PG, bonus_PG, 0.0)
    if centred:
        mean_P1 = bonus_PG.sum(dim=1, keepdim=True) / chosen_PG.sum(dim=1, keepdim=True)
        bonus_PG = torch.where(chosen_PG, bonus_PG - mean_P1, 0.0)
    return bonus_PG


def entropy_penalty(entropy_PG: Tensor, ref_entropy_PG: Tensor, scale: float) -> Tensor:
    """Equations 13 and 14: the loss term scale x mean of (H - H_ref)^2, a scalar with gradient."""
    return scale * (entropy_PG - ref_entropy_PG).square().mean()


def token_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of the divergence from the reference, exp(d) - d - 1 >= 0 with
    d = log pi_ref - log pi of the sampled token; of the inputs' shape.
    """
    difference = ref_logprobs - logprobs
    return torch.expm1(difference) - difference


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the last axis of the logits, which it removes."""
    logprobs = logits.log_softmax(dim=-1)
    return (logprobs.exp() * (logprobs - ref_logits.log_softmax(dim=-1))).sum(dim=-1)


def clipped_gain(
    ratio: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1 - low, 1 + high) A) of equation 3, and where the clip holds it back, bool;
    of the inputs' shape.
    """
    whole, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return torch.minimum(whole, clipped), clipped < whole


def grpo_loss(
    ratio: Tensor,
    advantages: Tensor,
    kl: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float | Tensor,
    token_mask: Tensor | None = None,
) -> GrpoLoss:
    """Equation 3, negated: -min(r A, clip(r, 1 - clip, 1 + clip_high) A) + beta x KL, averaged over
    T, then G, then P.

    `ratio` and `kl` are PGT; `advantages` and `beta` anything that broadcasts to it, such as
    advantages_PG[:, :, None] without a mask or beta times `kl_weight`. `clip_high` None is `clip`;
    an infinite `clip` never binds. `token_mask`, PGT, is that of `image_mean`.
    """
    high = clip if clip_high is None else clip_high
    gain, held_back = clipped_gain(ratio, advantages, clip, high)
    # Every group has G completions, so the mean over these is one over groups too.
    policy = -token_mean(gain, token_mask)
    weighted_kl = token_mean(beta * kl, token_mask)
    clip_fraction = token_mean(held_back.float(), token_mask)
    return GrpoLoss(policy + weighted_kl, policy, weighted_kl, clip_fraction)
