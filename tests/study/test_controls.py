"""The control arms."""

import torch

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.config import load_recipe
from stage_rl.objective.record import CreditInputs
from stage_rl.objective.stage import stage
from stage_rl.study.controls import permuted_stage

TOKENS = 12


def inputs(codes_PGTC):
    zeros_PGT = torch.zeros(codes_PGTC.shape[:3])
    advantages_PG = torch.tensor([[1.0, -0.5, -0.5]]).expand(len(codes_PGTC), -1)
    return CreditInputs(
        advantages_PG=advantages_PG,
        rewards_PG=advantages_PG,
        summed_rewards_PG=advantages_PG,
        scores={},
        valid_P=torch.ones(len(codes_PGTC)),
        equal_P=torch.zeros(len(codes_PGTC), dtype=torch.bool),
        codes_PGTC=codes_PGTC,
        grid=(3, 4),
        vocab=64,
        logprobs_PGT=zeros_PGT,
        ref_logprobs_PGT=zeros_PGT,
        entropy_PGT=zeros_PGT,
        ref_entropy_PGT=zeros_PGT,
    )


def test_a_permuted_mask_keeps_the_weights_of_each_image_and_loses_their_place():
    codes = torch.randn(2, 3, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    settings = AlgorithmConfig.model_validate({"kl": {"weight_clip": [0, 2]}})
    plain, moved = stage(inputs(codes), settings), permuted_stage(inputs(codes), settings)
    for before, after in ((plain.policy_PGT, moved.policy_PGT), (plain.kl_PGT, moved.kl_PGT)):
        assert torch.equal(before.sort(-1).values, after.sort(-1).values)
        assert not torch.equal(before, after)
    # A token's two weights move together: KL weight and mask are functions of one similarity.
    pairs = torch.stack([plain.policy_PGT, plain.kl_PGT], -1)[0, 0]
    kept = torch.stack([moved.policy_PGT, moved.kl_PGT], -1)[0, 0]
    assert all((pairs == pair).all(-1).any() for pair in kept)


def test_the_permutation_depends_on_the_image_alone():
    codes = torch.randn(2, 3, TOKENS, 4, generator=torch.Generator().manual_seed(1))
    both = permuted_stage(inputs(codes), AlgorithmConfig()).policy_PGT
    second = permuted_stage(inputs(codes[1:]), AlgorithmConfig()).policy_PGT
    assert torch.equal(both[1:], second)


def test_a_recipe_names_it():
    key = "algorithm.credit=stage_rl.study.controls:permuted_stage"
    assert load_recipe("shapes_strict", [key]).algorithm.credit.endswith("permuted_stage")
