"""STAGE and plain GRPO as rules of token credit.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import torch

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.record import CreditInputs, CreditOutputs


def stage(inputs: CreditInputs, settings: AlgorithmConfig) -> CreditOutputs:
    """STAGE (arXiv 2509.25027), equations 5 to 8 and section 3.2: a token that looks the same in
    better and worse images gets less of the advantage and more of the KL.
    """
    sim_PGT = algorithm.opposing_similarity(
        inputs.codes_PGTC, inputs.advantages_PG, self_similarity=settings.self_similarity
    )
    if settings.equal_group_similarity is not None:
        undecided_P = algorithm.equal_reward_groups(inputs.rewards_PG)
        sim_PGT = algorithm.equal_group_similarity(
            sim_PGT, undecided_P, settings.equal_group_similarity
        )
    mask_PGT = policy_PGT = kl_PGT = torch.ones_like(sim_PGT)
    if settings.reweights_advantages:
        mask_PGT = policy_PGT = algorithm.advantage_mask(sim_PGT)
        if settings.mask_normalization == "group_mean":
            policy_PGT = algorithm.normalize_mask(mask_PGT, token_mask_PGT=inputs.token_mask_PGT)
    if settings.weights_kl:
        kl = settings.kl
        kl_PGT = algorithm.kl_weight(sim_PGT, kl.a, kl.b, weight_clip=kl.weight_clip)
    metrics = {"similarity/mean": sim_PGT, "mask/mean": mask_PGT}
    return CreditOutputs(policy_PGT, kl_PGT, metrics=metrics)


def uniform(inputs: CreditInputs, settings: AlgorithmConfig) -> CreditOutputs:
    """Plain GRPO: every token has the advantage of its image and the same KL."""
    ones_PGT = torch.ones_like(inputs.logprobs_PGT)
    return CreditOutputs(ones_PGT, ones_PGT)
