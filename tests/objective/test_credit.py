"""Credits by the recipe's settings, with hand-worked numbers."""

import math
from dataclasses import fields, replace

import pytest
import torch
from credit_parts import credit_inputs, tensor

from stage_rl.algorithm import group_advantages
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.advantage import entropy_share
from stage_rl.objective.credit import assign_credit, credit_metrics
from stage_rl.objective.record import CreditOutputs, MeasuredGroups
from stage_rl.objective.stage import stage
from stage_rl.settings import BUILT_IN, resolve_function
from stage_rl.training.metrics import credited_metrics, equal_group_metrics

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


RULES = (
    *BUILT_IN["credit"],
    *({"kind": "critical", "daw": daw, "daw_gradient": "through"} for daw in ("release", "paper")),
    {"kind": "guidance", "eta": "exact"},
    {"kind": "entropy_bonus", "form": "paper"},
    {"kind": "high_entropy", "scope": "group"},
)
"""Every rule, and its other forms."""


def measured(*rewards):
    """Groups of three images of 4 x 5 tokens with all that a rule may need, some with gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(rewards), 3, 20)

    def some(*more):
        return torch.rand(*shape, *more, generator=generator, dtype=torch.float64)

    known = {name: -some().requires_grad_() for name in ("logprobs_PGT", "ref_logprobs_PGT")}
    return credit_inputs(
        tensor([*rewards]),
        20,
        **known,
        grid=(4, 5),
        codes_PGTC=some(4) - 0.5,
        entropy_PGT=some(),
        ref_entropy_PGT=some(),
        cond_logprobs_PGT=-some(),
        uncond_logprobs_PGT=-some(),
        guidance_kl_PGT=some(),
        embeddings_PGTD=some(4),
        guided_entropy_PGT=some(),
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_weights_of_every_rule_are_finite_constants_and_not_below_0(rule):
    inputs = measured([1.0, -0.5, -0.5], [0.2, 0, -0.2])
    function = resolve_function("credit", rule)
    outputs = function(inputs, AlgorithmConfig())
    assert outputs.policy_PGT.isfinite().all()
    assert outputs.kl_PGT.isfinite().all()
    known = {f.name: getattr(inputs, f.name) for f in fields(MeasuredGroups)}
    credit = assign_credit(function, MeasuredGroups(**known), AlgorithmConfig())
    assert not credit.advantages_PGT.requires_grad
    assert not credit.kl_weight_PGT.requires_grad
    assert (outputs.kl_PGT >= 0).all()
    # The mean of clip(D) of the paper's dynamic weight has the sign of D; here D is of both signs.
    signed = isinstance(rule, dict) and rule.get("daw") == "paper"
    assert (outputs.policy_PGT < 0).any() == signed


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_group_without_advantages_has_none_of_its_tokens_and_no_bonus(rule):
    inputs = measured([0.0, 0, 0], [0.2, 0, -0.2])
    outputs = resolve_function("credit", rule)(inputs, AlgorithmConfig())
    assert (outputs.policy_PGT * inputs.advantages_PG[..., None])[0].count_nonzero() == 0
    if outputs.bonus_PGT is not None:
        assert outputs.bonus_PGT[0].count_nonzero() == 0
        assert outputs.bonus_PGT[1].count_nonzero() > 0


def test_the_size_of_a_weight_is_that_of_a_negative_one_too():
    outputs = CreditOutputs(tensor([[[0.5, -1.5]]]), tensor([[[1.0, 1]]]))
    metrics = credit_metrics(outputs, tensor([[1.0]]))
    assert metrics["credit/policy_weight"].item() == 1


def test_the_metrics_of_credit_are_those_of_the_groups_that_are_learned_from():
    inputs = measured([1.0, -0.5, -0.5], [0.2, 0, -0.2])
    known = {f.name: getattr(inputs, f.name) for f in fields(MeasuredGroups)}
    settings = AlgorithmConfig.model_validate(NO_ENTROPY)
    one = MeasuredGroups(**known | {"valid_P": tensor([1.0, 0])})
    credit = assign_credit(stage, one, settings)
    numbers = credited_metrics(credit)
    assert numbers["mask/mean"] == pytest.approx(credit.metrics["mask/mean"][0].mean().item())
    assert numbers["kl/weight"] == pytest.approx(credit.kl_weight_PGT[0].mean().item())
    none = MeasuredGroups(**known | {"valid_P": tensor([0.0, 0])})
    assert credited_metrics(assign_credit(stage, none, settings)) == {}


@pytest.mark.parametrize("rule", ["stage", "uniform"])
def test_the_last_tokens_under_a_mask_are_as_if_the_images_were_shorter(rule):
    whole = measured([1.0, -0.5, -0.5], [0.2, 0, -0.2])
    known = {f.name: getattr(whole, f.name) for f in fields(MeasuredGroups)}
    counts = torch.ones(2, 3, 20, dtype=torch.bool)
    counts[..., 15:] = False
    shorter = {
        name: value[:, :, :15]
        for name, value in known.items()
        if name.endswith(("PGT", "PGTC")) and value is not None
    }
    settings = AlgorithmConfig.model_validate({"entropy": {"scope": "all"}})
    function = resolve_function("credit", rule)
    masked, expected = (
        assign_credit(function, MeasuredGroups(**known | more), settings)
        for more in ({"token_mask_PGT": counts}, {**shorter, "grid": (3, 5)})
    )
    assert torch.allclose(masked.advantages_PG, expected.advantages_PG)
    assert torch.allclose(masked.advantages_PGT[..., :15], expected.advantages_PGT)
    assert torch.allclose(masked.kl_weight_PGT[..., :15], expected.kl_weight_PGT)
    for name in ("credit/ess", "credit/top_tenth", "credit/zero", "credit/policy_weight"):
        assert torch.allclose(masked.metrics[name], expected.metrics[name])


@pytest.mark.parametrize("rule", ["critical", "guidance", "entropy_bonus", "high_entropy"])
def test_a_rule_that_ranks_the_tokens_of_an_image_refuses_a_mask(rule):
    inputs = measured([1.0, -0.5, -0.5])
    masked = replace(inputs, token_mask_PGT=torch.ones(1, 3, 20, dtype=torch.bool))
    with pytest.raises(RecipeError, match=f"credit: {rule} ranks all .* write uniform or stage"):
        resolve_function("credit", rule)(masked, AlgorithmConfig())
