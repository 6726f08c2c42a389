"""Weights by what the prompt changes, by the numbers of the released functions."""

import math

import pytest
import torch
from credit_parts import credit_inputs, tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.guidance import ALPHA, guidance, rank_weights, sampled_eta

COND = tensor([[[-1.0, -2.0, -0.5, -3.0, -1.5]]])
UNCOND = tensor([[[-1.2, -4.0, -0.6, -2.5, -1.4]]])
ETA = [0.018731, 1.135335, 0.004837, 0.148721, 0.005171]
WEIGHT = [0.785078, 2.355234, 0.073924, 1.457517, 0.328247]  # of ranks 3 5 1 4 2


@pytest.mark.parametrize("eta", ["sampled", "exact"])
def test_the_weight_goes_by_the_rank_of_the_divergence(eta):
    known = {"cond_logprobs_PGT": COND, "uncond_logprobs_PGT": UNCOND}
    if eta == "exact":
        known = {"guidance_kl_PGT": tensor([[ETA]]) * 7}  # another size, the same ranks
    inputs = credit_inputs(tensor([[1.0]]), 5, **known)
    outputs = guidance(inputs, AlgorithmConfig(), eta=eta)
    assert outputs.policy_PGT[0, 0].tolist() == pytest.approx(WEIGHT, abs=1e-6)
    assert outputs.policy_PGT.sum().item() == pytest.approx(5)
    # 0.5 + 0.5 clip(2 - 2 w, 0, 1)
    assert outputs.kl_PGT[0, 0].tolist() == pytest.approx([0.714922, 0.5, 1, 0.5, 1], abs=1e-6)


def test_the_divergence_by_the_sampled_token_is_bounded():
    assert sampled_eta(COND, UNCOND)[0, 0].tolist() == pytest.approx(ETA, abs=1e-6)
    assert sampled_eta(tensor([-30.0]), tensor([0.0])).item() == 10
    assert sampled_eta(tensor([0.0]), tensor([-3.0])).item() == pytest.approx(2 + math.exp(-3))


def test_two_fifths_of_the_ranks_hold_four_fifths_of_the_weight():
    weight = rank_weights(torch.arange(576, dtype=torch.float64))
    assert pytest.approx(2.150660, abs=1e-6) == ALPHA
    assert weight.topk(230).values.sum().item() / 576 == pytest.approx(0.7989, abs=1e-4)
    assert weight.max().item() == pytest.approx(3.142, abs=1e-3)
    assert weight.min().item() == pytest.approx(3.6e-6, abs=1e-7)
    kl = 0.5 + 0.5 * (2 - 2 * weight).clamp(0, 1)
    assert kl.mean().item() == pytest.approx(0.755, abs=1e-3)


def test_equal_values_are_ranked_by_position():
    assert (rank_weights(torch.zeros(4)).diff() > 0).all()
