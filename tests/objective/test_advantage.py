"""Several rewards: each normalized by itself, against the sum, by hand."""

import pytest
import torch
from credit_parts import credit_inputs, tensor

from stage_rl.algorithm import group_advantages
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.distributed import concat
from stage_rl.objective.advantage import image_advantages, reward_terms
from stage_rl.types import Rewards

FIRST = tensor([[1.0, 0, 1], [0, 0, 1]])
SECOND = tensor([[0.2, 0.2, 0.2], [0.1, 0.5, 0.3]])
NO_ENTROPY = {"entropy": {"mode": "none"}}
GDPO = AlgorithmConfig.model_validate({"advantage": "gdpo", **NO_ENTROPY})


def rewards_of(components, weights, kept=(True, True)):
    total_PG = sum(weights[name] * value for name, value in components.items())
    return Rewards(total_PG, torch.tensor(kept), {}, (), components, weights)


BOTH = rewards_of({"a": FIRST, "b": SECOND}, {"a": 1.0, "b": 0.5})


def advantages(rewards, settings=GDPO, **known):
    groups = credit_inputs(rewards.rewards_PG, 4, terms=reward_terms(rewards, settings), **known)
    return image_advantages(groups, settings)


def rounded(values_PG):
    return [pytest.approx(row, abs=1e-6) for row in values_PG.tolist()]


def test_the_sum_of_rewards_is_normalized_once():
    found = advantages(BOTH, AlgorithmConfig.model_validate(NO_ENTROPY))
    assert rounded(found.advantages_PG) == [
        [0.577250, -1.154501, 0.577250],
        [-0.739418, -0.398148, 1.137566],
    ]


def test_gdpo_normalizes_every_reward_and_the_step():
    plain = advantages(BOTH, GDPO.model_copy(update={"whiten": "none"}))
    assert rounded(plain.advantages_PG) == [
        [0.577250, -1.154501, 0.577250],
        [-1.077000, -0.077500, 1.154501],
    ]
    found = advantages(BOTH)
    assert rounded(found.advantages_PG) == [
        [0.608539, -1.217077, 0.608539],
        [-1.135376, -0.081701, 1.217077],
    ]
    assert found.metrics["gdpo/std"].tolist() == pytest.approx([0.948485] * 2, abs=1e-6)
    # In the second group A_1 = (-.57725 -.57725 1.1545), A_2 / 2 = (-.49975 .49975 0).
    share = found.metrics["gdpo/b_share"][1].tolist()
    assert share == pytest.approx([0.49975 / 1.077, 0.49975 / 1.077, 0], abs=1e-5)
    assert (found.metrics["gdpo/b_share"][0] == 0).all()


def test_two_totals_that_a_sum_cannot_tell_apart():
    # Totals (0, 1) and (0, 2) are both +-.707 by their sum; eps is 1e-4.
    both = {"a": tensor([[0.0, 1], [0, 1]]), "b": tensor([[0.0, 0], [0, 1]])}
    rewards = rewards_of(both, {"a": 1.0, "b": 1.0})
    settings = GDPO.model_copy(update={"advantage_eps": 1e-12})
    summed = advantages(rewards, settings.model_copy(update={"advantage": "sum"}))
    assert rounded(summed.advantages_PG) == [[-0.707107, 0.707107]] * 2
    found = advantages(rewards, settings.model_copy(update={"whiten": "none"}))
    assert rounded(found.advantages_PG) == [[-0.707107, 0.707107], [-1.414214, 1.414214]]


def test_a_reward_that_is_listed_twice_at_half_its_weight_changes_nothing():
    twice = rewards_of(
        {"a": FIRST, "b": SECOND, "again": SECOND}, {"a": 1.0, "b": 0.25, "again": 0.25}
    )
    assert torch.allclose(advantages(twice).advantages_PG, advantages(BOTH).advantages_PG)


def test_one_reward_is_plain_grpo():
    one = rewards_of({"a": FIRST, "logged": SECOND}, {"a": 2.0, "logged": 0.0})
    assert reward_terms(one, GDPO) is None
    assert torch.equal(advantages(one).advantages_PG, group_advantages(2 * FIRST, 1e-4))


def test_a_reward_that_does_not_apply_adds_nothing_and_equal_scores_are_exactly_0():
    nothing = rewards_of(
        {"a": tensor([[0.9] * 3, [0, 0, 1]]).float(), "b": SECOND * torch.nan}, BOTH.weights
    )
    found = advantages(nothing).advantages_PG
    assert (found[0] == 0).all()
    assert found.isfinite().all()


def test_a_group_that_left_the_step_is_not_in_its_deviation():
    terms = reward_terms(
        rewards_of({"a": FIRST, "b": SECOND}, BOTH.weights, kept=(True, False)), GDPO
    )
    # (.57725 -1.1545 .57725), unbiased.
    assert terms.std_P.tolist() == pytest.approx([0.577250 * 3**0.5] * 2, abs=1e-5)


def test_the_terms_of_a_micro_batch_are_those_of_the_step():
    terms = reward_terms(BOTH, GDPO)
    parts = [terms.of(slice(i, i + 1), torch.device("cpu")) for i in range(2)]
    both = concat(parts)
    assert all(torch.equal(both.by_reward[name], terms.by_reward[name]) for name in "ab")
    assert torch.equal(both.std_P, terms.std_P)


def test_the_entropy_reward_is_one_more_term():
    settings = AlgorithmConfig.model_validate({"advantage": "gdpo"})
    # The best of the first group by both rewards are images 0 and 2, of the second image 2:
    # 1 / (1 + 0) and 1 / (1 + 1) for entropies of 2 and 3 beside 2.
    entropy_PGT = tensor([[2.0, 2, 3], [2, 2, 3]])[:, :, None].expand(-1, -1, 4)
    known = {"entropy_PGT": entropy_PGT, "ref_entropy_PGT": torch.full_like(entropy_PGT, 2)}
    found = advantages(BOTH, settings, **known)
    bonus = group_advantages(tensor([[1, 0, 0.5], [0, 0, 0.5]]), 1e-4)
    assert torch.allclose(found.advantages_PG, advantages(BOTH).advantages_PG + 0.4 * bonus)
    # An even bonus would be (.75 0 .75): normalized (.577217 -1.154434 .577217) in place of
    # (.9998 -.9998 0); .4 x 1.154434 over 1.008459 + 1.616997 + .608539. With one best image the
    # bonus is even.
    share = found.metrics["entropy/advantage_share"].tolist()
    assert share == pytest.approx([0.142788, 0], abs=2e-6)


@pytest.mark.parametrize("size", [1, 0.1])
def test_dr_grpo_keeps_the_size_of_the_rewards(size):
    rewards = rewards_of({"a": size * tensor([[0.0, 1, 1, 1], [1, 1, 1, 1]])}, {"a": 1.0})
    settings = AlgorithmConfig.model_validate({"loss": "dr_grpo", **NO_ENTROPY})
    found = advantages(rewards, settings).advantages_PG
    quarter = pytest.approx([size * a for a in (-0.75, 0.25, 0.25, 0.25)])
    assert found.tolist() == [quarter, [0, 0, 0, 0]]
    plain = advantages(rewards, settings.model_copy(update={"loss": "clip"})).advantages_PG
    first = {1: -1.499700, 0.1: -1.497006}[size]
    assert plain[0, 0].item() == pytest.approx(first, abs=1e-6)
