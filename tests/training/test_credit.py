"""Credits by the recipe's settings, with hand-worked numbers."""

import pytest
import torch

from stage_rl.recipe import AlgorithmConfig
from stage_rl.training.update import credit

# A group of two with rewards 1 and 0 and two tokens: equal codes, then opposite ones.
CODES = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]])
# std of (1, 0), unbiased: sqrt(1/2); advantages +-0.5 / sqrt(0.5)
ADVANTAGE = 0.5 / 0.5**0.5


def credits(rewards=((1.0, 0.0),), *, kept=(1.0,), entropies=((2.0, 2.0),), **settings):
    return credit(
        torch.tensor(rewards),
        valid_P=torch.tensor(kept),
        entropy_PG=torch.tensor(entropies),
        ref_entropy_PG=torch.tensor([[2.0, 2.0]]),
        codes_PGTC=CODES,
        settings=AlgorithmConfig.model_validate({"advantage_eps": 1e-12, **settings}),
    )


NO_ENTROPY = {"entropy": {"mode": "none"}}


def test_similar_tokens_get_no_advantage_and_full_kl_weight():
    result = credits(**NO_ENTROPY)
    assert result.similarity_PGT[0].tolist() == [[1, -1], [1, -1]]
    # mask (1 - sim) / 2 = (0, 1), mean 1/2: the advantages are multiplied by (0, 2)
    assert result.mask_PGT[0].tolist() == [[0, 1], [0, 1]]
    expected = [[0, 2 * ADVANTAGE], [0, -2 * ADVANTAGE]]
    assert torch.allclose(result.advantages_PGT[0], torch.tensor(expected), atol=1e-5)
    # 0.5 + 0.5 x clip(sim + 1, 0, 1)
    assert result.kl_weight_PGT[0].tolist() == [[1, 0.5], [1, 0.5]]


def test_the_paper_preset_leaves_the_mask_as_it_is():
    result = credits(preset="paper", **NO_ENTROPY)
    assert result.mask_PGT[0].tolist() == [[0, 1], [0, 1]]
    expected = [[0, ADVANTAGE], [0, -ADVANTAGE]]
    assert torch.allclose(result.advantages_PGT[0], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("reweight", "masked", "weighted"),
    [("none", False, False), ("kl", False, True), ("advantages", True, False)],
)
def test_each_half_of_the_reweighting_can_be_left_out(reweight, masked, weighted):
    result = credits(reweight=reweight, **NO_ENTROPY)
    assert (result.mask_PGT != 1).any() == masked
    assert (result.kl_weight_PGT != 1).any() == weighted


def test_in_a_group_of_equal_rewards_the_entropy_reward_decides():
    result = credits(((1.0, 1.0),), entropies=((2.0, 2.05),), advantage_eps=1e-4, reweight="none")
    # bonuses 0.4 and 0.4 / 1.0025, std 7.05e-4: (4.99e-4) / (7.05e-4 + 1e-4) = 0.619
    assert result.advantages_PGT.abs().mean() > 0.5


def test_the_entropy_bonus_goes_to_the_best_of_the_group():
    result = credits(entropies=((3.0, 3.0),))
    # 1 / (1 + 1) x 0.4 on the sample with reward 1 alone
    assert result.rewards_PG.tolist() == [pytest.approx([1.2, 0.0])]


def test_a_group_with_equal_rewards_learns_from_entropy_alone_by_default():
    entropies = ((2.0, 5.0),)
    result = credits(rewards=((1.0, 1.0),), entropies=entropies)
    assert result.equal_P.tolist() == [True]
    assert (result.advantages_PGT != 0).any()
    dropped = credits(rewards=((1.0, 1.0),), entropies=entropies, equal_reward_groups="drop_policy")
    assert (dropped.advantages_PGT == 0).all()
    assert (dropped.kl_weight_PGT != 0).all()
    without_kl = credits(rewards=((1.0, 1.0),), entropies=entropies, equal_reward_groups="drop_kl")
    assert (without_kl.kl_weight_PGT == 0).all()
    assert (without_kl.advantages_PGT != 0).any()


def test_the_released_code_calls_undecided_groups_wholly_similar():
    result = credits(rewards=((1.0, 1.0),), preset="release", entropy={"mode": "none"})
    assert (result.similarity_PGT == 1).all()
    assert (result.mask_PGT == 0).all()
    assert (result.kl_weight_PGT == 1).all()


def test_a_group_that_left_the_step_moves_nothing():
    result = credits(kept=(0.0,))
    assert (result.advantages_PGT == 0).all()
    assert (result.kl_weight_PGT == 0).all()
