"""The losses: values and gradients by hand, and that they are one at ratio 1."""

import math
from dataclasses import replace

import pytest
import torch
from credit_parts import loss_inputs, tensor

from stage_rl import algorithm
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective import loss as losses

TOKENS = tensor([[[2.0, 1, 0], [-1, -0.5, 0]]])
IMAGES = tensor([[[1.0] * 3, [-0.5] * 3]])
MOVED = tensor([[[0.1, 0.3, -0.3], [0.1, -0.3, 0.05]]])
WIDER = AlgorithmConfig(clip=0.2, clip_high=0.28)
NAMES = ("clip", "unclipped", "dr_grpo", "gspo", "gspo_token", "gmpo", "cispo", "sapo")


def learned(name, inputs, settings=None, **parameters):
    """Loss and factors -N T d loss / d log-probability."""
    outputs = getattr(losses, name)(inputs, settings or AlgorithmConfig(), **parameters)
    outputs.total.backward()
    factors = -inputs.logprobs_PGT.numel() * inputs.logprobs_PGT.grad
    return outputs, factors.flatten().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_1_one_advantage_per_image_has_one_gradient(name):
    _, factors = learned(name, loss_inputs(IMAGES))
    assert factors == pytest.approx([1, 1, 1, -0.5, -0.5, -0.5], abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_1_a_ratio_per_image_loses_token_credit_and_no_other_does(name):
    _, factors = learned(name, loss_inputs(TOKENS))
    mean = [1, 1, 1, -0.5, -0.5, -0.5]
    expected = mean if name in ("gspo", "gmpo") else [2, 1, 0, -1, -0.5, 0]
    assert factors == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "loss"), [("clip", -0.25), ("gspo", -0.25), ("gmpo", -0.25), ("sapo", -0.523810)]
)
def test_the_value_of_a_loss_at_ratio_1(name, loss):
    outputs, _ = learned(name, loss_inputs(TOKENS))
    assert outputs.policy.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "loss", "factors", "held_back"),
    [
        ("clip", -0.274628, [1.105171, 0, 0.740818, -0.552585, 0, -0.525636], 2 / 6),
        ("dr_grpo", -0.274628, [1.105171, 0, 0.740818, -0.552585, 0, -0.525636], 2 / 6),
        ("cispo", None, [1.105171, 1.28, 0.8, -0.552585, -0.4, -0.525636], 3 / 6),
        ("gmpo", -0.279140, [1.033895] * 3 + [-0.475615] * 3, 0),
        ("gspo", -0.250275, [0] * 6, 1),
        (
            *("sapo", -0.564527),
            [1.102120, 1.309381, 0.728515, -0.550904, -0.363635, -0.525255],
            None,
        ),
    ],
)
def test_what_a_loss_makes_of_ratios(name, loss, factors, held_back):
    outputs, found = learned(name, loss_inputs(IMAGES, MOVED), WIDER)
    assert found == pytest.approx(factors, abs=1e-6)
    if loss is not None:
        assert outputs.policy.item() == pytest.approx(loss, abs=1e-6)
    if held_back is not None:
        assert outputs.metrics["clip/fraction"].item() == pytest.approx(held_back)
        both = outputs.metrics["clip/high"] + outputs.metrics["clip/low"]
        assert both.item() == pytest.approx(held_back)


def test_the_tokens_that_a_clip_holds_back_are_told_apart_and_left_out_groups_not_counted():
    inputs = loss_inputs(IMAGES, MOVED)
    metrics = losses.clip(inputs, WIDER).metrics
    # exp(.3) above 1.28 with A = 1, exp(-.3) below .8 with A = -.5, of six tokens.
    assert (metrics["clip/high"].item(), metrics["clip/low"].item()) == (1 / 6, 1 / 6)
    assert metrics["ratio/max"].item() == pytest.approx(math.exp(0.3))
    none = losses.clip(replace(inputs, valid_P=inputs.valid_P * 0), WIDER).metrics
    assert {value.item() for value in none.values()} == {0}


def test_gmpo_clips_logarithms_token_by_token():
    # Only what lowers the gain: .5 of the first image, and -.5 of the second; means 0 and .1 / 3.
    moved = tensor([[[0.5, -0.5, 0.1], [0.5, -0.5, 0.1]]])
    outputs, factors = learned("gmpo", loss_inputs(IMAGES, moved))
    assert outputs.policy.item() == pytest.approx(-(1 - 0.5 * math.exp(0.2 / 3)) / 2)
    assert [f == 0 for f in factors] == [True, False, False, False, True, False]


def test_gspo_token_clips_whole_images_and_credits_tokens():
    # s = exp(.0002) of the first image is within, exp(.001) of the second above.
    moved = tensor([[[0.0002] * 3, [0.001] * 3]])
    ratio = math.exp(0.0002)
    _, factors = learned("gspo_token", loss_inputs(TOKENS.abs(), moved))
    assert factors == pytest.approx([2 * ratio, ratio, 0, 0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("moved", [None, MOVED])
def test_clip_and_k3_are_the_bits_of_the_equations(moved):
    known = {"ref_logprobs_PGT": tensor([[[-1.5, -1, -2], [-1.2, -1.9, -1]]]), "beta": 0.03}
    inputs, same = (loss_inputs(TOKENS, moved, **known) for _ in range(2))
    outputs = losses.clip(inputs, WIDER)
    expected = algorithm.grpo_loss(
        algorithm.importance_ratio(same.logprobs_PGT, same.old_logprobs_PGT),
        TOKENS,
        algorithm.token_kl(same.logprobs_PGT, same.ref_logprobs_PGT),
        clip=0.2,
        clip_high=0.28,
        beta=same.beta_PGT,
    )
    assert outputs.total.item() == expected.total.item()
    outputs.total.backward()
    expected.total.backward()
    assert torch.equal(inputs.logprobs_PGT.grad, same.logprobs_PGT.grad)


@pytest.mark.parametrize("name", NAMES)
def test_without_advantages_only_the_kl_pulls(name):
    known = {"ref_logprobs_PGT": torch.full_like(TOKENS, -1.4), "beta": 0.03}
    outputs, factors = learned(name, loss_inputs(0 * TOKENS, MOVED, **known))
    assert outputs.policy == 0
    inputs = loss_inputs(0 * TOKENS, MOVED, **known)
    kl = algorithm.token_kl(inputs.logprobs_PGT, inputs.ref_logprobs_PGT)
    (0.03 * kl).mean().backward()
    assert factors == pytest.approx((-6 * inputs.logprobs_PGT.grad).flatten().tolist(), abs=1e-12)


def test_an_exact_kl_is_taken_as_it_is_given():
    inputs = loss_inputs(0 * TOKENS, MOVED, beta=0.5)
    exact = replace(inputs, exact_kl_PGT=inputs.logprobs_PGT * 3)
    settings = AlgorithmConfig.model_validate({"kl": {"estimator": "exact"}})
    outputs, factors = learned("clip", exact, settings)
    assert outputs.kl.item() == pytest.approx(1.5 * inputs.logprobs_PGT.mean().item())
    assert factors == pytest.approx([-1.5] * 6)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_tokens_under_a_mask_are_as_if_the_image_were_shorter(name):
    known = {"ref_logprobs_PGT": torch.full_like(TOKENS, -1.4), "beta": 0.03}
    whole = loss_inputs(TOKENS, MOVED, **known)
    counts = torch.tensor([[[True, True, False]] * 2])
    masked = replace(whole, token_mask_PGT=counts)
    columns = {
        key: value[..., :2].detach()
        for key, value in vars(whole).items()
        if key.endswith("PGT") and value is not None
    }
    shorter = replace(whole, **columns)
    shorter.logprobs_PGT.requires_grad_()
    (found, factors), (expected, fewer) = (learned(name, x, WIDER) for x in (masked, shorter))
    assert found.total.item() == pytest.approx(expected.total.item(), abs=1e-12)
    values = {key: value.item() for key, value in found.metrics.items()}
    assert values == pytest.approx({k: v.item() for k, v in expected.metrics.items()})
    # Factors are per token of the tensor: 6 of the first, 4 of the second.
    gradient, shorter_gradient = (tensor(f) / len(f) for f in (factors, fewer))
    assert torch.allclose(gradient.view(2, 3)[:, :2].flatten(), shorter_gradient, atol=1e-12)
    assert (gradient.view(2, 3)[:, 2] == 0).all()


def test_images_of_different_lengths_count_alike():
    # Equation 3: means (2 + 1) / 2 of the first image, -1 of the second.
    counts = torch.tensor([[[True, True, False], [True, False, False]]])
    inputs = replace(loss_inputs(TOKENS), token_mask_PGT=counts)
    assert losses.clip(inputs, AlgorithmConfig()).policy.item() == -(1.5 - 1) / 2
