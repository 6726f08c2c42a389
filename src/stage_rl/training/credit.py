"""From rewards and entropies to what each token is credited with: equations 2, 5 to 8, 11, 12.

Shape suffixes: P prompts, G group, T image tokens, C codebook channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from stage_rl import algorithm
from stage_rl.objective import AlgorithmConfig


@dataclass(frozen=True)
class Credit:
    """The weights of the loss for some groups; constants, without gradient."""

    rewards_PG: Tensor
    """With the entropy bonus."""
    equal_P: Tensor
    """Groups whose rewards were all equal before the bonus."""
    kept_P: Tensor
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
    kept_P: Tensor,
    entropy_PG: Tensor,
    ref_entropy_PG: Tensor,
    codes_PGTC: Tensor,
    settings: AlgorithmConfig,
) -> Credit:
    """Credits the tokens of whole groups; a group's credit needs nothing of the others."""
    equal_P = algorithm.equal_reward_groups(rewards_PG)
    factors = algorithm.equal_group_factors(equal_P, settings.equal_reward_groups)
    kept_P = kept_P.to(rewards_PG.dtype)
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
        kept_P=kept_P,
        similarity_PGT=sim_PGT,
        mask_PGT=mask_PGT,
        advantages_PGT=algorithm.reweight_advantages(
            advantages_PG * (factors.policy_P * kept_P)[:, None], factor_PGT
        ),
        kl_weight_PGT=weight_PGT * (factors.kl_P * kept_P)[:, None, None],
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
