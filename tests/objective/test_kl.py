"""Estimators of the KL: values and expected gradients over a codebook of three."""

import pytest
import torch
from credit_parts import tensor

from stage_rl.algorithm import exact_kl, importance_ratio
from stage_rl.objective.kl import kl_metrics, token_divergence

POLICY, REFERENCE, SAMPLER = (
    tensor([0.5, 0.3, 0.2]),
    tensor([0.4, 0.2, 0.4]),
    tensor([0.7, 0.2, 0.1]),
)
FORWARD = [0.064281, 0.093265, -0.157546]  # of KL(policy, reference) over the logits, .094582
BACKWARD = [0.1, 0.1, -0.2]  # of KL(reference, policy)


def expected(estimator, samples_from):
    """Value and gradient over the logits, in expectation over the sampled token."""
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    tokens = token_divergence(estimator, logprobs, REFERENCE.log(), samples_from.log())
    value = (samples_from * tokens).sum()
    value.backward()
    return value.item(), logits.grad.tolist()


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", 0.094582, [0, 0, 0]),
        ("k2", 0.085154, FORWARD),
        ("k3", 0.094582, BACKWARD),
        ("k3+", 0.094582, FORWARD),
        ("rk3", 0.094582, FORWARD),
    ],
)
def test_an_estimator_on_samples_of_the_policy(estimator, value, gradient):
    found = expected(estimator, POLICY)
    assert found[0] == pytest.approx(value, abs=1e-6)
    assert found[1] == pytest.approx(gradient, abs=1e-6)


def test_the_exact_divergences_and_their_gradients():
    for backwards, value, gradient in ((False, 0.094582, FORWARD), (True, 0.106908, BACKWARD)):
        logits = POLICY.log().requires_grad_()
        pair = (REFERENCE.log(), logits) if backwards else (logits, REFERENCE.log())
        divergence = exact_kl(*pair)
        divergence.backward()
        assert divergence.item() == pytest.approx(value, abs=1e-6)
        assert logits.grad.tolist() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("in_the_reward", [True, False])
def test_k1_in_the_reward_or_times_the_ratio_pulls_as_the_exact_one(in_the_reward):
    """A reward is a constant that the ratio to the old policy is multiplied by."""
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    k1 = token_divergence("k1", logprobs, REFERENCE.log(), POLICY.log())
    ratio = importance_ratio(logprobs, POLICY.log())
    (POLICY * ratio * (k1.detach() if in_the_reward else k1)).sum().backward()
    assert logits.grad.tolist() == pytest.approx(FORWARD, abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        ("k1", [0.2, -0.1, -0.1]),
        ("k2", [0.072211, 0.030699, -0.102910]),
        ("k3", [0.086667, 0.034667, -0.121333]),
        ("rk3", FORWARD),
    ],
)
def test_on_samples_of_another_policy_only_the_ratio_keeps_the_gradient(estimator, gradient):
    assert expected(estimator, SAMPLER)[1] == pytest.approx(gradient, abs=1e-6)


def test_the_metrics_leave_groups_out():
    logprobs = tensor([[[-1.0]], [[-3.0]]])
    found = kl_metrics(logprobs, torch.full_like(logprobs, -2.0), tensor([1.0, 0]))
    # d = -1: exp(-1) - (-1) - 1, 1 and 1 / 2, over two groups.
    assert found["kl/mean"].item() == pytest.approx(torch.e**-1 / 2)
    assert (found["kl/k1"].item(), found["kl/k2"].item()) == (0.5, 0.25)


def test_the_metrics_leave_tokens_out():
    logprobs, counts = tensor([[[-1.0, -3]]]), torch.tensor([[[True, False]]])
    found = kl_metrics(logprobs, torch.full_like(logprobs, -2.0), tensor([1.0]), counts)
    assert found["kl/k1"].item() == 1
