"""The objective by hand: every function, and every point where its readings differ.

Groups are small enough for the arithmetic to stand in a comment. The three readings are `default`,
`paper` (its equations read literally) and `release` (the released code).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from stage_rl import algorithm
from stage_rl.bench.reweight import pair_loop_similarity

SQRT_HALF = math.sqrt(0.5)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Equation 2


def test_advantages_are_centred_and_divided_by_the_unbiased_std():
    # Mean 0.5; deviations -0.5, 0.5, 0, 0; variance (0.25 + 0.25) / 3 = 1/6.
    advantages_PG = algorithm.group_advantages(tensor([[0, 1, 0.5, 0.5]]))
    unit = 0.5 / (math.sqrt(1 / 6) + 1e-4)
    assert advantages_PG.flatten().tolist() == pytest.approx([-unit, unit, 0, 0])


def test_advantages_of_one_group_do_not_depend_on_the_others():
    rewards_PG = randn(3, 4)
    alone = torch.cat([algorithm.group_advantages(row[None]) for row in rewards_PG])
    assert torch.equal(algorithm.group_advantages(rewards_PG), alone)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6 / 7])
def test_advantages_of_equal_rewards_are_exactly_zero(reward):
    # In fp32 the mean of eight 1e6 / 7 or of seven 0.1 is not that number.
    for group_size in (1, 7, 8):
        rewards_PG = torch.full((2, group_size), reward)
        assert torch.equal(algorithm.group_advantages(rewards_PG), torch.zeros(2, group_size))


@pytest.mark.parametrize(("std_floor", "expected"), [(0.0, SQRT_HALF), (0.05, 0.1)])
def test_the_floor_keeps_a_tiny_difference_tiny_and_leaves_a_usual_one(std_floor, expected):
    # Rewards 0 and 0.01: deviation 0.005, std 0.01 x sqrt(1/2); over it: 0.7071; over 0.05: 0.1.
    advantages_PG = algorithm.group_advantages(tensor([[0, 0.01]]), eps=1e-12, std_floor=std_floor)
    assert advantages_PG.flatten().tolist() == pytest.approx([-expected, expected])
    usual_PG = tensor([[0, 1, 0, 1]])
    with_floor = algorithm.group_advantages(usual_PG, std_floor=std_floor)
    assert torch.equal(with_floor, algorithm.group_advantages(usual_PG))


# Equal-reward groups


def test_equal_reward_groups_are_those_with_one_reward_level():
    rewards_PG = tensor([[1, 1, 1], [1, 1, 0.999], [0, 0, 0]])
    assert algorithm.equal_reward_groups(rewards_PG).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("handling", "policy", "kl"),
    [
        ("keep", [1, 1], [1, 1]),
        ("drop_policy", [0, 1], [1, 1]),
        ("drop_kl", [1, 1], [0, 1]),
        ("drop_all", [0, 1], [0, 1]),
    ],
)
def test_handling_drops_terms_of_equal_groups_only(handling, policy, kl):
    factors = algorithm.equal_group_factors(torch.tensor([True, False]), handling)
    assert factors.policy_P.tolist() == policy
    assert factors.kl_P.tolist() == kl


def test_the_released_similarity_of_an_equal_group_is_one():
    # Similarity 1: mask (1 - 1) / 2 = 0, KL weight 0.5 + 0.5 x clip(2) = 1.
    sim_PGT = tensor([[[-0.6, 0.2]], [[-0.6, 0.2]]])
    filled_PGT = algorithm.equal_group_similarity(sim_PGT, torch.tensor([True, False]))
    assert filled_PGT.tolist() == [[[1, 1]], [[-0.6, 0.2]]]
    assert algorithm.advantage_mask(filled_PGT)[0].tolist() == [[0, 0]]
    assert algorithm.kl_weight(filled_PGT)[0].tolist() == [[1, 1]]


# Equations 5 and 6


def plane(*degrees):
    """Vectors in the plane at these angles, of different lengths, codes_PGTC with P = T = 1."""
    angles = torch.deg2rad(tensor(list(degrees)))
    lengths = torch.arange(1, len(degrees) + 1)
    return (torch.stack([angles.cos(), angles.sin()], dim=-1) * lengths[:, None])[None, :, None]


@pytest.mark.parametrize(
    ("self_similarity", "of_zero", "of_zeros"),
    [
        # Completion 2 has A = 0 and opposes 0 and 1: cosines cos 90 = 0, cos 30 = 0.8660.
        (None, 0.8660254 / 2, 0.5),
        (1.0, (0.8660254 + 1) / 3, 0.75),
        (0.0, 0.8660254 / 3, 0.25),
    ],
    ids=["default", "paper", "release"],
)
def test_a_completion_of_advantage_zero_opposes_all(self_similarity, of_zero, of_zeros):
    sim_PGT = algorithm.opposing_similarity(
        plane(0, 60, 90), tensor([[1, -1, 0]]), self_similarity=self_similarity
    )
    # 0 opposes 1 and 2: cos 60 = 0.5 and cos 90 = 0, mean 0.25; 1 opposes 0 and 2: 0.5, 0.8660.
    assert sim_PGT.flatten().tolist() == pytest.approx([0.25, 1.3660254 / 2, of_zero])
    # In a group of zeros all oppose all: cosine 0.5 with the other; (0.5 + 1) / 2; (0.5 + 0) / 2.
    sim_PGT = algorithm.opposing_similarity(
        plane(0, 60), tensor([[0, 0]]), self_similarity=self_similarity
    )
    assert sim_PGT.flatten().tolist() == pytest.approx([of_zeros, of_zeros])


def test_similarity_compares_opponents_at_the_same_position_and_is_zero_without_one():
    # T = 2: equal vectors at the first position, opposite ones at the second.
    codes_PGTC = tensor([[[[1, 0], [0, 1]], [[2, 0], [0, -3]]]])
    sim_PGT = algorithm.opposing_similarity(codes_PGTC, tensor([[1, -1]]))
    assert sim_PGT.tolist() == [[[1, -1], [1, -1]]]
    assert not algorithm.opposing_similarity(codes_PGTC, tensor([[1, 2]])).any()


@pytest.mark.parametrize("group_size", [2, 5, 8])
def test_one_product_equals_the_loop_over_pairs(group_size):
    codes_PGTC = randn(3, group_size, 6, 4)
    advantages_PG = randn(3, group_size, seed=1)
    advantages_PG[0, 0] = 0
    advantages_PG[1] = 0
    fast = algorithm.opposing_similarity(codes_PGTC, advantages_PG)
    slow = pair_loop_similarity(codes_PGTC, advantages_PG)
    assert (fast - slow).abs().max() <= 1e-12
    single = algorithm.opposing_similarity(codes_PGTC.float(), advantages_PG.float())
    assert (single - slow.float()).abs().max() <= 1e-6


# Equations 7 and 8 and the weight of section 3.2


def test_the_mask_maps_similarity_to_the_unit_interval():
    # (1 - s) / 2; a cosine of 1 + rounding does not go below 0.
    mask_PGT = algorithm.advantage_mask(tensor([[[-1, 0, 0.5, 1, 1.0000001]]]))
    assert mask_PGT.flatten().tolist() == [1, 0.5, 0.25, 0, 0]


def test_a_normalized_mask_has_mean_one_in_each_group_and_one_of_zeros_stays():
    # Group 0: mean (0.2 + 0.4 + 0.6 + 0.8) / 4 = 0.5; group 1: mean 0.1.
    mask_PGT = tensor([[[0.2, 0.4], [0.6, 0.8]], [[0.1, 0.1], [0.1, 0.1]]])
    normal = algorithm.normalize_mask(mask_PGT, eps=0.0)
    assert normal[0].flatten().tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert normal[1].flatten().tolist() == pytest.approx([1, 1, 1, 1])
    assert torch.equal(algorithm.normalize_mask(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("preset", "policy"),
    [
        # A = (1, -1), M = ((0.5, 0.1), (0.1, 0.1)). Sum of M A: 0.6 - 0.2 = 0.4; 4 tokens.
        ("paper", -0.4 / 4),
        # Sum of M: 0.8.
        ("release", -0.4 / 0.8),
        # Mean of M: 0.2; M / 0.2 = ((2.5, 0.5), (0.5, 0.5)); (3 - 1) / 4.
        ("default", -2 / 4),
    ],
)
def test_the_policy_term_of_a_group_by_hand(preset, policy):
    advantages_PG = tensor([[1, -1]])
    mask_PGT = tensor([[[0.5, 0.1], [0.1, 0.1]]])
    ratio_PGT, kl_PGT = torch.ones_like(mask_PGT), torch.full_like(mask_PGT, 0.3)
    if preset != "paper":
        mask_PGT = algorithm.normalize_mask(mask_PGT)
    advantages_PGT = algorithm.reweight_advantages(advantages_PG, mask_PGT)
    loss = algorithm.grpo_loss(ratio_PGT, advantages_PGT, kl_PGT, beta=0.1)
    # The KL term, 0.1 x 0.3, is scaled by none of them; 1e-6 is added to the sum of M.
    assert loss.policy.item() == pytest.approx(policy, rel=2e-6)
    assert loss.kl.item() == pytest.approx(0.03)


@pytest.mark.parametrize("normalize", [False, True])
def test_with_two_reward_levels_the_masked_advantages_of_a_token_add_up_to_zero(normalize):
    # Between k and G - k completions with A = G - k and -k, up to scale, each pair (i, j) gives
    # M_ij / (G - k) x (G - k) on one side and M_ij / k x k on the other.
    advantages_PG = algorithm.group_advantages(tensor([[1, 0, 0, 1, 0, 0, 0, 0], [0, 1] * 4]))
    mask_PGT = algorithm.advantage_mask(
        algorithm.opposing_similarity(randn(2, 8, 9, 4), advantages_PG)
    )
    if normalize:
        mask_PGT = algorithm.normalize_mask(mask_PGT)
    sums_PT = algorithm.reweight_advantages(advantages_PG, mask_PGT).sum(dim=1)
    assert advantages_PG.abs().min() > 0.3
    assert sums_PT.abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("b", "weight_clip", "expected"),
    [
        # Every preset: 0.5 + 0.5 clip(s + 1, 0, 1) for s = -1, -0.5, 0, 0.6.
        (0.5, (0.0, 1.0), [0.5, 0.75, 1.0, 1.0]),
        # Active on the whole range: 0.5 + 0.25 (s + 1).
        (0.25, (0.0, 2.0), [0.5, 0.625, 0.75, 0.9]),
    ],
)
def test_the_kl_weight_by_hand(b, weight_clip, expected):
    weight_PGT = algorithm.kl_weight(tensor([[[-1, -0.5, 0, 0.6]]]), b=b, weight_clip=weight_clip)
    assert weight_PGT.flatten().tolist() == pytest.approx(expected)


# Equations 9 to 14


def test_entropy_of_tokens_and_completions_by_hand():
    # Uniform over 4: ln 4. p = (3/4, 1/4, 0, 0): 3/4 ln 4/3 + 1/4 ln 4 = 0.562335.
    logits = tensor([[[[0, 0, 0, 0], [math.log(3), 0, -800, -800]]]])
    entropy_PGT = algorithm.token_entropy(logits)
    assert entropy_PGT.flatten().tolist() == pytest.approx([math.log(4), 0.5623351])
    assert algorithm.completion_entropy(entropy_PGT).tolist() == [
        [pytest.approx((math.log(4) + 0.5623351) / 2)]
    ]


def test_the_entropy_bonus_falls_with_the_gap_on_either_side():
    # Gaps 0, 1, -1, 3: 1, 1/2, 1/2, 1/10.
    entropy_PG = tensor([[2, 1, 3, 5]]).requires_grad_()
    bonus_PG = algorithm.entropy_bonus(entropy_PG, torch.full((1, 4), 2.0, dtype=torch.float64))
    assert bonus_PG.flatten().tolist() == pytest.approx([1, 0.5, 0.5, 0.1])
    assert not bonus_PG.requires_grad


@pytest.mark.parametrize(
    ("rewards", "bonus", "settings", "expected"),
    [
        # Best: completions 1 and 3, bonus 0.5 and 1, mean 0.75; scale 0.4.
        ([0, 1, 0.5, 1], [0.9, 0.5, 0.2, 1], {"centred": False}, [0, 1.2, 0.5, 1.4]),
        ([0, 1, 0.5, 1], [0.9, 0.5, 0.2, 1], {"centred": True}, [0, 0.9, 0.5, 1.1]),
        # A single best gains nothing when centred.
        ([0, 1, 0], [0.1, 0.9, 0.3], {"centred": False}, [0, 1.36, 0]),
        ([0, 1, 0], [0.1, 0.9, 0.3], {"centred": True}, [0, 1, 0]),
        ([0, 1, 0], [0.2, 0.5, 0.8], {"scope": "all"}, [0.08, 1.2, 0.32]),
        # Mean 0.5.
        ([0, 1, 0], [0.2, 0.5, 0.8], {"scope": "all", "centred": True}, [-0.12, 1.0, 0.12]),
        # Each group has its own best.
        ([[0, 1], [0, 0.5]], [[1, 1], [1, 1]], {}, [0, 1.4, 0, 0.9]),
    ],
)
def test_the_best_of_a_group_or_all_get_the_bonus(rewards, bonus, settings, expected):
    rewards_PG, bonus_PG = (torch.atleast_2d(tensor(values)) for values in (rewards, bonus))
    rewards_PG = algorithm.add_entropy_bonus(rewards_PG, bonus_PG, 0.4, **settings)
    assert rewards_PG.flatten().tolist() == pytest.approx(expected)


def test_the_entropy_penalty_pulls_towards_the_reference():
    # Gaps 1 and -2: 0.01 x (1 + 4) / 2; derivative 0.01 x 2 x gap / 2.
    entropy_PG = tensor([[3, 0]]).requires_grad_()
    penalty = algorithm.entropy_penalty(entropy_PG, tensor([[2, 2]]), 0.01)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.025)
    assert entropy_PG.grad is not None
    assert entropy_PG.grad.flatten().tolist() == pytest.approx([0.01, -0.02])


# Divergences


def test_k3_by_hand_and_never_negative_in_fp32():
    # d = ref - logp = ln 2, 0, -ln 2: 2 - ln 2 - 1, 0, 1/2 + ln 2 - 1.
    log2 = math.log(2)
    kl = algorithm.token_kl(tensor([-3 * log2, -1, -log2]), tensor([-2 * log2, -1, -2 * log2]))
    assert kl.tolist() == pytest.approx([1 - log2, 0, log2 - 0.5])
    size = torch.logspace(-12, 1, 20001)
    difference = torch.cat([size, -size])
    assert algorithm.token_kl(torch.zeros_like(difference), difference).min() >= 0


def test_the_exact_divergence_by_hand_and_as_the_mean_of_k3_on_samples():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2.
    kl = algorithm.exact_kl(tensor([[math.log(3), 0]]), tensor([[7, 7]]))
    assert kl.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5)])
    logits, ref_logits = randn(6), randn(6, seed=1)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    mean = (logprobs.exp() * algorithm.token_kl(logprobs, ref_logprobs)).sum()
    assert mean.item() == pytest.approx(algorithm.exact_kl(logits, ref_logits).item())


# Equations 3 and 4


@pytest.mark.parametrize(
    ("ratio", "advantage", "policy", "held_back"),
    [
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # clip at 1.3
        (0.5, 2.0, -1.0, False),  # the minimum keeps the unclipped
        (0.5, -2.0, 1.6, True),  # clip at 0.8
        (1.5, -2.0, 3.0, False),
    ],
)
def test_the_clip_holds_back_gains_only_and_may_be_wider_above(ratio, advantage, policy, held_back):
    terms = tensor([[[ratio]]]), tensor([[[advantage]]]), tensor([[[0.0]]])
    loss = algorithm.grpo_loss(*terms, clip=0.2, clip_high=0.3, beta=0.0)
    assert loss.policy.item() == pytest.approx(policy)
    assert loss.clip_fraction.item() == held_back
    above = algorithm.grpo_loss(*terms, clip=0.2, beta=0.0).policy.item()
    assert above == pytest.approx(-2.4 if policy == -2.6 else policy)


def test_beta_is_a_number_or_a_weight_per_token():
    ones, kl_PGT = torch.ones(1, 1, 2, dtype=torch.float64), tensor([[[1.0, 3.0]]])
    number = algorithm.grpo_loss(ones, ones, kl_PGT, beta=0.1)
    weights = algorithm.grpo_loss(ones, ones, kl_PGT, beta=0.1 * tensor([[[1.0, 0.5]]]))
    # -1 + 0.1 x (1 + 3) / 2 and -1 + 0.1 x (1 + 1.5) / 2.
    assert number.total.item() == pytest.approx(-0.8)
    assert weights.total.item() == pytest.approx(-0.875)
    assert weights.kl.item() == pytest.approx(0.125)
    assert weights.total.item() == (weights.policy + weights.kl).item()


def test_in_one_update_the_clipped_ratio_equals_the_released_form():
    # Released: exp(logp - logp.detach()) without clip. Old log-probabilities of the same weights
    # make equation 4 the same ratio, 1, and no clip binds: same value, same gradient.
    by_hand = algorithm.importance_ratio(tensor([math.log(0.3)]), tensor([math.log(0.2)]))
    assert by_hand.tolist() == pytest.approx([1.5])
    advantages = randn(2, 3, 4, seed=1)
    gradients, values = [], []
    for clip in (0.2, math.inf):
        logprobs = (-randn(2, 3, 4).exp()).requires_grad_()
        kl = algorithm.token_kl(logprobs, -randn(2, 3, 4, seed=2).exp())
        old = logprobs.detach().clone() if clip == 0.2 else logprobs.detach()
        ratio = algorithm.importance_ratio(logprobs, old)
        loss = algorithm.grpo_loss(ratio, advantages, kl, clip=clip, beta=0.03)
        gradients.append(torch.autograd.grad(loss.total, logprobs)[0])
        values.append(loss.total)
        assert loss.clip_fraction == 0
    assert torch.equal(values[0], values[1])
    assert torch.equal(gradients[0], gradients[1])


# The readings as a whole


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        # Group of two, rewards 1 and 0, entropy gap 0: bonus 1 for the first.
        # Reward 1.4, 0: deviation 0.7, std 1.4 / sqrt(2) = 0.98995, A = +-0.7 / 0.99005 = 0.707035.
        # Codes 60 degrees apart: sim 0.5, mask 0.25, weight 1; k3 = 0.2, beta 0.1: KL 0.02.
        # First ratio 1.5 is held at 1.2: (1.2 - 1) x 0.707035 / 2 x mask.
        ("paper", -0.1 * 0.707035 * 0.25 + 0.02),
        ("default", -0.1 * 0.707035 + 0.02),
        # Centred: rewards 1, 0: 0.5 / (0.707107 + 1e-4) = 0.707007; no clip: (1.5 - 1) / 2.
        ("release", -0.25 * 0.707007 + 0.02),
    ],
)
def test_one_group_through_every_equation(preset, expected):
    zeros_PG = torch.zeros(1, 2, dtype=torch.float64)
    bonus_PG = algorithm.entropy_bonus(zeros_PG, zeros_PG)
    rewards_PG = algorithm.add_entropy_bonus(
        tensor([[1, 0]]), bonus_PG, 0.4, centred=preset == "release"
    )
    advantages_PG = algorithm.group_advantages(rewards_PG)
    sim_PGT = algorithm.opposing_similarity(
        plane(0, 60),
        advantages_PG,
        self_similarity={"paper": 1.0, "release": 0.0, "default": None}[preset],
    )
    mask_PGT = algorithm.advantage_mask(sim_PGT)
    if preset != "paper":
        mask_PGT = algorithm.normalize_mask(mask_PGT)
    loss = algorithm.grpo_loss(
        tensor([[[1.5], [1.0]]]),
        algorithm.reweight_advantages(advantages_PG, mask_PGT),
        tensor([[[0.2], [0.2]]]),
        clip=math.inf if preset == "release" else 0.2,
        beta=0.1 * algorithm.kl_weight(sim_PGT),
    )
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_module_imports_torch_and_of_ours_only_the_choice_of_its_kernels():
    source = Path(algorithm.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) ([\w.]+)", source, re.MULTILINE))
    assert imported == {"__future__", "typing", "torch", "stage_rl.vector_math"}
