"""What docs/method.md names under "Not here", in the terms of what is here: the numbers of its
papers and codes come out of the functions of the package.
"""

import math

import pytest
import torch
from credit_parts import loss_inputs, tensor

from stage_rl.algorithm import group_advantages, token_kl
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.entropy import most_uncertain
from stage_rl.objective.importance import importance_metrics
from stage_rl.objective.loss import LossOutputs, gspo, policy_loss

SETTINGS = AlgorithmConfig()


def test_luspo_is_gspo_times_the_number_of_tokens():
    inputs = loss_inputs(tensor([[[2.0, 1, 0], [-1, -0.5, 0]]]))
    loss = 3 * gspo(inputs, SETTINGS).policy
    loss.backward()
    assert loss.item() == pytest.approx(-0.75)
    factors = -6 * inputs.logprobs_PGT.grad
    assert factors.flatten().tolist() == pytest.approx([3, 3, 3, -1.5, -1.5, -1.5])


def prime_rl(inputs, settings):
    """-r A where the probability moved by at most .2 along A, and 1e-3 (log r)^2."""
    log_ratio_PGT = inputs.logprobs_PGT - inputs.old_logprobs_PGT
    moved_PGT = inputs.logprobs_PGT.detach().exp() - inputs.old_logprobs_PGT.exp()
    near_PGT = moved_PGT * inputs.advantages_PGT.sign() <= 0.2
    gain_PGT = near_PGT * log_ratio_PGT.exp() * inputs.advantages_PGT
    loss = (1e-3 * log_ratio_PGT.square() - gain_PGT).mean()
    return LossOutputs(loss, loss, torch.zeros_like(loss))


def test_the_default_of_prime_rl_has_the_gradient_of_the_others_at_ratio_1():
    advantages = tensor([[[2.0, 1, 0], [-1, -0.5, 0]]])
    inputs = loss_inputs(advantages)
    policy_loss(prime_rl, inputs, SETTINGS).total.backward()
    factors = -6 * inputs.logprobs_PGT.grad
    assert torch.allclose(factors, advantages, rtol=0, atol=1e-12)
    # Probabilities of .135, .165 and more grow by e^.8 - 1: by .166, .202 and more.
    inputs = loss_inputs(advantages.abs() + 1, torch.full_like(advantages, 0.8))
    policy_loss(prime_rl, inputs, SETTINGS).total.backward()
    factors = -6 * inputs.logprobs_PGT.grad
    expected = [3 * math.exp(0.8) - 1.6e-3] + [-1.6e-3] * 5
    assert factors.flatten().tolist() == pytest.approx(expected)


def test_the_most_uncertain_tokens_over_the_number_of_all():
    entropy = tensor([[0.1, 0.9, 0.3, 0.5, 0.2], [0.8, 0.7, 0.05, 0.6, 0.4]])
    learns = most_uncertain(entropy, 0.2)
    # One token of each image, A = 1 and -.5, over ten; `high_entropy` gives -.25.
    assert -(learns * tensor([[1.0], [-0.5]])).mean().item() == pytest.approx(-0.05)


def test_a_pair_of_prompts_with_one_mean_and_deviation():
    rewards = tensor([[1.0, 1], [0, 0]])
    assert group_advantages(rewards).tolist() == [[0, 0], [0, 0]]
    # std of (1 1 0 0), unbiased: sqrt(1/3); .5 / (.577350 + 1e-4).
    paired = group_advantages(rewards.view(1, 4)).flatten().tolist()
    assert paired == pytest.approx([0.865875, 0.865875, -0.865875, -0.865875], abs=1e-6)


def test_the_coefficient_that_holds_an_entropy_at_a_target():
    psi = tensor(0.0).requires_grad_()
    optimizer = torch.optim.Adam([psi], lr=5e-5)
    coefficients = []
    for entropy in (7.4, 7.4, 6.5, None):
        coefficients.append(psi.sinh().clamp(-5e-3, 5e-3).item())
        if entropy is not None:
            optimizer.zero_grad()
            (-psi.sinh() * (entropy - 7)).backward()
            optimizer.step()
            with torch.no_grad():
                psi.copy_(psi.sinh().clamp(-5e-3, 5e-3).asinh())
    assert coefficients == pytest.approx([0, 5.0e-5, 1.0e-4, 1.0779e-4], abs=1e-8)


def test_prompts_drawn_by_the_spread_of_their_rewards():
    # Biased variances of rewards in {0, 1}, of equal rewards, and two more.
    variance = tensor([0.25, 0, 0.1875, 0.1])
    assert tensor([0.0, 1, 1, 1]).var(correction=0).item() == variance[2].item()
    proposal = (variance - variance.min()) / (variance.max() - variance.min())
    assert proposal.tolist() == pytest.approx([1, 0, 0.75, 0.4])
    of_category = (1 + 2 * tensor([0.5, 0.3, 0.2])) / (3 + 2)
    assert of_category.tolist() == pytest.approx([0.4, 0.32, 0.28])


def test_the_deviation_of_gdpo_over_tokens():
    first = group_advantages(tensor([[1.0, 0, 1], [0, 0, 1]]), 1e-6)
    second = group_advantages(tensor([[0.2, 0.2, 0.2], [0.1, 0.5, 0.3]]), 1e-6)
    total = first + 0.5 * second
    num_tokens, num_images = 4, 6
    over_tokens = total * (total.repeat_interleave(num_tokens).var() + 1e-8).rsqrt()
    assert over_tokens[0, 0].item() == pytest.approx(0.652630, abs=1e-6)
    factor = (num_images * num_tokens - 1) / (num_tokens * (num_images - 1))
    over_images = total / total.std()
    assert torch.allclose(over_tokens, over_images * factor**0.5, atol=1e-7)


def test_what_filters_by_k3_go_by():
    rho = tensor([[1.1, 0.9, 3], [0.4, 1.05, 1.2]])
    k3 = token_kl(torch.zeros_like(rho), rho.log()).mean(-1)
    assert k3.tolist() == pytest.approx([0.303813, 0.111726], abs=1e-6)


def test_without_importance_weights_every_token_is_in_effect():
    weight = torch.ones(1, 2, 3, dtype=torch.float64)
    assert (weight * tensor([[[1.0], [-1]]])).mean() == 0
    settings = AlgorithmConfig(importance_sampling="token_truncate")
    assert importance_metrics(weight, settings)["importance/ess"].tolist() == [1]
