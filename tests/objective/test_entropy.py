"""Token credit by entropy, by the numbers of the released code and the papers."""

import math

import pytest
import torch
from credit_parts import credit_inputs, tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.entropy import entropy_bonus, high_entropy, most_uncertain

NORMED = tensor([0.3, 0.9, 0.1, 0.55, 0.7, 0.2, 0.8, 0.4, 0.6, 0.5])
VOCAB = 16


def advantages(form, image_advantages, **parameters):
    """Of the tokens of a group whose images all have these entropies."""
    entropy_PGT = (NORMED * math.log(VOCAB)).expand(1, len(image_advantages), -1)
    inputs = credit_inputs(tensor([image_advantages]), 10, entropy_PGT=entropy_PGT, vocab=VOCAB)
    outputs = entropy_bonus(inputs, AlgorithmConfig(), form=form, **parameters)
    assert (outputs.kl_PGT == 1).all()
    tokens = outputs.policy_PGT * inputs.advantages_PG[..., None] + outputs.bonus_PGT
    return [pytest.approx(image.tolist(), abs=1e-6) for image in tokens[0]]


def test_the_released_bonus_is_capped_by_the_advantage_and_never_turns_it():
    # Thresholds .55 and .30: tokens 1 4 6 8 are high, 2 and 5 low.
    assert advantages("release", [1.0]) == [[1, 1.27, 0, 1, 1.21, 0, 1.24, 1, 1.18, 1]]
    half = [-0.5, -0.35, 0, -0.5, -0.35, 0, -0.35, -0.5, -0.35, -0.5]  # capped at .15
    assert advantages("release", [-0.5]) == [half]


def test_the_papers_bonus_spreads_what_the_low_tokens_lose():
    # L = (1 + .5) 2 / 10 / (2 x .355) = .422535; tokens 1 3 4 6 8 are high.
    best, worst = advantages("paper", [1.0, -0.5])
    assert best == [1, 1.380282, 0, 1.232394, 1.295775, 0, 1.338028, 1, 1.253521, 1]
    assert worst.expected[1] == pytest.approx(-0.119718, abs=1e-6)
    (half, _) = advantages("paper", [1.0, -0.5], kappa=0.5)
    assert half.expected[1] == pytest.approx(1 + 0.380282 / 2, abs=1e-6)


@pytest.mark.parametrize("form", ["release", "paper"])
def test_an_image_of_advantage_0_gets_no_bonus_and_the_others_what_they_would_without_it(form):
    best, worst = advantages(form, [1.0, -0.5])
    between = [[1.0, 0.0, -0.5], [0.0] * 10]
    assert advantages(form, between[0]) == [best.expected, between[1], worst.expected]


@pytest.mark.parametrize("form", ["release", "paper"])
def test_without_advantages_there_is_no_bonus(form):
    assert advantages(form, [0.0, 0.0]) == [[0] * 10] * 2


def test_half_of_576_tokens_but_one_is_high_and_a_fifth_low():
    entropy_PGT = torch.rand(1, 1, 576, generator=torch.Generator().manual_seed(0)).double()
    inputs = credit_inputs(tensor([[1.0]]), 576, entropy_PGT=entropy_PGT)
    outputs = entropy_bonus(inputs, AlgorithmConfig())
    assert (outputs.bonus_PGT > 0).sum() == 287
    assert (outputs.policy_PGT == 0).sum() == 115


@pytest.mark.parametrize("scope", ["image", "group"])
def test_the_most_uncertain_fifth_learns_and_the_loss_is_its_mean(scope):
    entropy = tensor([[[0.1, 0.9, 0.3, 0.5, 0.2], [0.8, 0.7, 0.05, 0.6, 0.4]]])
    inputs = credit_inputs(tensor([[1.0, -0.5]]), 5, entropy_PGT=entropy)
    outputs = high_entropy(inputs, AlgorithmConfig(), scope=scope)
    assert outputs.policy_PGT.nonzero().tolist() == [[0, 0, 1], [0, 1, 0]]
    assert (outputs.kl_PGT == 1).all()
    # Divided by the number of these tokens; divided by all it would be -.05.
    loss = -(outputs.policy_PGT * inputs.advantages_PG[..., None]).mean()
    assert loss.item() == pytest.approx(-0.25)


def test_in_a_group_an_image_may_have_more_of_the_uncertain_tokens():
    entropy = tensor([[[9.0, 8, 7, 0], [1.0, 2, 3, 4]]])
    inputs = credit_inputs(tensor([[1.0, -1.0]]), 4, entropy_PGT=entropy)
    weight = high_entropy(inputs, AlgorithmConfig(), share=0.5, scope="group").policy_PGT
    assert weight.tolist() == [[[2, 2, 2, 0], [0, 0, 0, 2]]]


def test_a_share_is_rounded_up_and_not_by_the_arithmetic():
    # 0.2 x 15 is 3.0000000000000004 in fp64.
    assert most_uncertain(torch.arange(15.0), 0.2).sum() == 3
    assert most_uncertain(torch.arange(16.0), 0.2).sum() == 4
    assert most_uncertain(torch.arange(16.0), 1e-12).sum() == 1
