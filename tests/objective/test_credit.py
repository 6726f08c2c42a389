"""Credits by the recipe's settings, with hand-worked numbers."""

import math

import pytest
import torch

from stage_rl.algorithm import group_advantages
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.advantage import entropy_share
from stage_rl.objective.credit import assign_credit
from stage_rl.objective.record import CreditOutputs, MeasuredGroups
from stage_rl.objective.stage import stage
from stage_rl.training.metrics import equal_group_metrics

# A group of two with rewards 1 and 0 and two tokens: equal codes, then opposite ones.
CODES = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]])
# std of (1, 0), unbiased: sqrt(1/2); advantages +-0.5 / sqrt(0.5)
ADVANTAGE = 0.5 / 0.5**0.5


def groups(rewards=((1.0, 0.0),), *, kept=(1.0,), entropies=((2.0, 2.0),), sampler=None):
    zeros_PGT = torch.zeros(1, 2, 2)
    entropy_PGT = torch.tensor(entropies)[:, :, None].expand(-1, -1, 2)
    return MeasuredGroups(
        summed_rewards_PG=torch.tensor(rewards),
        scores={},
        valid_P=torch.tensor(kept),
        codes_PGTC=CODES,
        grid=(1, 2),
        vocab=64,
        logprobs_PGT=zeros_PGT,
        ref_logprobs_PGT=zeros_PGT,
        entropy_PGT=entropy_PGT,
        ref_entropy_PGT=torch.full_like(entropy_PGT, 2.0),
        sampler_logprobs_PGT=sampler,
    )


def credits(*args, function=stage, settings=None, **known):
    algorithm = AlgorithmConfig.model_validate({"advantage_eps": 1e-12, **(settings or {})})
    return assign_credit(function, groups(*args, **known), algorithm)


def rewards_with_bonus(entropies, **settings):
    """What a credit function sees as the rewards of a group with 1 and 0."""
    seen = []

    def look(inputs, _):
        seen.append(inputs.rewards_PG.tolist())
        return CreditOutputs(inputs.logprobs_PGT + 1, inputs.logprobs_PGT + 1)

    credits(entropies=entropies, function=look, settings=settings)
    return seen[0]


NO_ENTROPY = {"entropy": {"mode": "none"}}


# Mask (1 - sim) / 2 = (0, 1); its mean is 1/2: advantages times (0, 2), in the paper times (0, 1).
@pytest.mark.parametrize(("preset", "factor"), [("default", 2), ("paper", 1)])
def test_similar_tokens_get_no_advantage_and_full_kl_weight(preset, factor):
    result = credits(settings={"preset": preset, **NO_ENTROPY})
    assert result.metrics["similarity/mean"][0].tolist() == [[1, -1], [1, -1]]
    # 0.5 + 0.5 x clip(sim + 1, 0, 1)
    assert result.kl_weight_PGT[0].tolist() == [[1, 0.5], [1, 0.5]]
    assert result.metrics["mask/mean"][0].tolist() == [[0, 1], [0, 1]]
    expected = [[0, factor * ADVANTAGE], [0, -factor * ADVANTAGE]]
    assert torch.allclose(result.advantages_PGT[0], torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("reweight", "masked", "weighted"),
    [("none", False, False), ("kl", False, True), ("advantages", True, False)],
)
def test_each_half_of_the_reweighting_can_be_left_out(reweight, masked, weighted):
    result = credits(settings={"reweight": reweight, **NO_ENTROPY})
    assert (result.metrics["mask/mean"] != 1).any() == masked
    assert (result.kl_weight_PGT != 1).any() == weighted


def test_the_entropy_bonus_goes_to_the_best_of_the_group():
    # 1 / (1 + 1) x 0.4 on the sample with reward 1 alone
    assert rewards_with_bonus(((3.0, 3.0),)) == [pytest.approx([1.2, 0.0])]


def test_in_a_group_of_equal_rewards_the_entropy_reward_decides():
    result = assign_credit(
        stage, groups(((1.0, 1.0),), entropies=((2.0, 2.05),)), AlgorithmConfig()
    )
    # bonuses 0.4 and 0.4 / 1.0025, std 7.05e-4: (4.99e-4) / (7.05e-4 + 1e-4) = 0.619
    assert result.advantages_PG.abs().mean() > 0.5
    assert result.advantages_PGT.abs().mean() > 0.5


@pytest.mark.parametrize(
    ("handling", "advantages", "kl"),
    [("keep", True, True), ("drop_policy", False, True), ("drop_kl", True, False)],
)
def test_a_group_with_equal_rewards_learns_from_entropy_alone_unless_dropped(
    handling, advantages, kl
):
    settings = {"equal_reward_groups": handling} if handling != "keep" else {}
    result = credits(((1.0, 1.0),), entropies=((2.0, 5.0),), settings=settings)
    assert result.advantages_PGT.any() == advantages
    assert result.kl_weight_PGT.all() == result.kl_weight_PGT.any() == kl


def test_the_released_code_calls_undecided_groups_wholly_similar():
    result = credits(((1.0, 1.0),), settings={"preset": "release", **NO_ENTROPY})
    assert (result.metrics["similarity/mean"] == 1).all()
    assert (result.metrics["mask/mean"] == 0).all()
    assert (result.kl_weight_PGT == 1).all()


def test_a_group_that_left_the_step_moves_nothing():
    result = credits(kept=(0.0,))
    assert (result.advantages_PGT == 0).all()
    assert (result.kl_weight_PGT == 0).all()


def test_a_constant_in_place_of_the_entropy_reward_minds_no_entropy():
    for entropies in ((3.0, 3.0), (2.0, 5.0)):
        found = rewards_with_bonus((entropies,), entropy={"mode": "constant"})
        assert found == [pytest.approx([1.4, 0.0])]


def test_importance_weights_scale_the_advantage_and_beta_is_weighted_by_similarity():
    # The trainer's probability over the sampler's: e and 1 / 2, capped at 2.
    sampler_PGT = torch.tensor([-1.0, math.log(2)]).expand(1, 2, 2)
    settings = {"importance_sampling": "token_truncate", "reweight": "kl", **NO_ENTROPY}
    result = credits(sampler=sampler_PGT, settings=settings)
    weighted = [[2 * ADVANTAGE, ADVANTAGE / 2], [-2 * ADVANTAGE, -ADVANTAGE / 2]]
    assert torch.allclose(result.advantages_PGT[0], torch.tensor(weighted))
    # beta 0.03 x (1, 1/2)
    assert result.beta_PGT[0, 0].tolist() == pytest.approx([0.03, 0.015])


def test_the_share_of_entropy_differences_in_the_advantages():
    settings = AlgorithmConfig.model_validate({"advantage_eps": 1e-12})
    # Three groups of two best and two others: equal bonuses, unequal ones, and no reward at all.
    rewards_PG = torch.tensor([[1.0, 1, 0, 0], [1.0, 1, 0, 0], [0.0, 0, 0, 0]])
    bonus_PG = torch.tensor([[0.4, 0.4, 0, 0], [0.4, 0.2, 0, 0], [0.4, 0.3, 0.2, 0.1]])
    advantages_PG = group_advantages(rewards_PG + bonus_PG, 1e-12)
    share_P = entropy_share(rewards_PG, rewards_PG + bonus_PG, advantages_PG, settings)
    # The second: (1.4, 1.2, 0, 0) against (1.3, 1.3, 0, 0), both centred at 0.65; the deviations
    # are sqrt(1.71 / 3) and sqrt(1.69 / 3).
    own = [value / (1.71 / 3) ** 0.5 for value in (0.75, 0.55, -0.65, -0.65)]
    even = [value / (1.69 / 3) ** 0.5 for value in (0.65, 0.65, -0.65, -0.65)]
    expected = sum(abs(a - b) for a, b in zip(own, even, strict=True)) / sum(map(abs, own))
    assert share_P.tolist() == pytest.approx([0, expected, 1], abs=1e-6)


def test_an_equal_group_has_the_advantages_that_entropy_makes():
    # Rewards (1, 1) and bonuses 0.4 e^-0.5 and 0.4: normalized, -1 and 1 over sqrt(2).
    equal = credits(((1.0, 1.0),), entropies=((2.5, 2.0),), settings={"advantage_std_floor": 0.0})
    assert equal_group_metrics(equal) == pytest.approx(
        {
            "entropy/equal_groups_share": 1.0,
            "entropy/equal_groups_advantage": 0.5**0.5,
        },
        abs=1e-5,
    )
    assert equal_group_metrics(credits()) == {}
    assert equal_group_metrics(credits(((1.0, 1.0),), settings=NO_ENTROPY)) == {}
    assert equal_group_metrics(credits(((1.0, 1.0),), kept=(0.0,))) == {}


def test_the_tokens_that_a_mask_leaves_in_effect():
    # Mask (0, 1), over its mean (0, 2): (0 + 2)^2 / (2 x 4).
    result = credits(settings=NO_ENTROPY)
    assert result.metrics["credit/ess"].tolist() == [[0.5, 0.5]]
