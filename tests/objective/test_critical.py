"""GCPO's critical tokens and their weights, by the numbers of the released functions."""

import pytest
import torch
from credit_parts import credit_inputs, tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.critical import (
    advantage_weights,
    critical,
    critical_tokens,
    entropy_steepness,
    group_similarity,
)

ROW, COLUMN = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
ENTROPY = torch.stack(
    [
        (3 * ROW * ROW + 5 * COLUMN + 2 * ROW * COLUMN) % 13,
        (2 * ROW + 7 * COLUMN + ROW * COLUMN * COLUMN) % 11,
    ]
).to(torch.float64)
SIMILARITY = ((7 * torch.arange(25) + 3) % 25).to(torch.float64) / 25
MOVED = tensor([[[0.2, -0.1, 0.9, -0.7]]])
MASK = tensor([[[1.0, 0, 1, 0]]])


def places(mask_T):
    return mask_T.nonzero().flatten().tolist()


def test_the_steepness_of_an_entropy_map():
    steepness = entropy_steepness(ENTROPY[None])[0].flatten(1)
    # Image 0, token 5 = (1, 0): dx 2.933333, dy 4.166667; the token at (1, 1) is smoothed to
    # (10 + 3 + 0 + 5 + 10) / 5 = 5.6.
    assert steepness[0, [5, 6]].tolist() == pytest.approx([5.095641, 3.020532], abs=1e-6)
    assert steepness[1, [21, 2]].tolist() == pytest.approx([3.262072, 3.176476], abs=1e-6)
    window = steepness[:, 2:22].sort(-1, descending=True).values
    assert window[:, 2].tolist() == pytest.approx([2.359143, 3.011829], abs=1e-6)


def test_the_three_kinds_of_tokens_are_those_of_the_released_code():
    chosen = critical_tokens(ENTROPY.flatten(1)[None], SIMILARITY[None], (5, 5))
    found = [[places(kind[0, image]) for kind in chosen[:3]] for image in range(2)]
    # 21 would be the least similar token of image 1 as well, and is taken by its outline.
    assert found == [[[0, 1], [5, 6], [14, 21]], [[0, 1], [2, 21], [7, 14]]]
    assert [places(chosen.overlap_PGT[0, image]) for image in range(2)] == [[], [21]]


@pytest.mark.parametrize("side", [8, 24])
def test_three_tenths_of_the_tokens_of_any_image_are_chosen(side):
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(2, 3, side * side, generator=generator)
    chosen = critical_tokens(entropy, torch.rand(2, side * side, generator=generator), (side, side))
    selected = chosen.first_PGT | chosen.struct_PGT | chosen.sim_PGT
    assert (selected.sum(-1) == 3 * (side * side // 10)).all()


def test_too_few_tokens_for_a_tenth_are_refused():
    with pytest.raises(RecipeError, match="takes a tenth of the tokens and the policy has 9; w"):
        critical_tokens(torch.zeros(1, 2, 9), torch.zeros(1, 9), (3, 3))


def test_similarity_is_the_mean_cosine_of_all_pairs_of_a_group():
    vectors = tensor([[1.0, 0], [0, 3], [2, 0]])[None, :, None]
    # The pairs have 0, 1 and 0.
    assert group_similarity(vectors)[0, 0].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("form", "through", "weight", "factor"),
    [
        ("release", False, [1.221403, 1.063120, 1.258320, 1.095373], [1.221403, 0, 1.258320, 0]),
        (
            *("release", True),
            [1.221403, 1.063120, 1.258320, 1.095373],
            [2.849940, 0.301612, 1.258320, 0],
        ),
        ("paper", False, [0.2, 0.05, 0.2, 0.025], [0.2, 0, 0.2, 0]),
        ("none", False, [1, 1, 1, 1], [1, 0, 1, 0]),
    ],
)
def test_the_dynamic_weight_of_the_advantage(form, through, weight, factor):
    factors, weights = advantage_weights(MOVED, MASK, form=form, through=through)
    assert weights[0, 0].tolist() == pytest.approx(weight, abs=1e-6)
    assert factors[0, 0].tolist() == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("form", ["release", "paper"])
def test_the_gradient_through_the_weight_is_that_of_autograd(form):
    """Of -ratio x A x w with w a function of the log-probabilities, at ratio 1 and A = 1."""
    logprobs = MOVED.clone().requires_grad_()
    clipped = logprobs.clamp(-0.5, 0.5)
    terms = clipped.exp() if form == "release" else clipped
    weight = terms.cumsum(-1) / torch.arange(1, 5)
    ((logprobs - logprobs.detach()).exp() * weight * MASK).sum().backward()
    factors, _ = advantage_weights(MOVED, MASK, form=form, through=True)
    assert torch.allclose(logprobs.grad, factors, atol=1e-12)


def test_at_576_tokens_the_gradient_through_the_weight_grows_towards_the_front():
    mask = torch.zeros(1, 1, 576, dtype=torch.float64)
    mask[..., :57] = 1
    mask[..., 57 : 57 + 4 * 114 : 4] = 1
    moved = torch.zeros_like(mask)
    factors, _ = advantage_weights(moved, mask, form="release", through=True)
    found = [factors[0, 0, t - 1].item() for t in (1, 2, 10, 57, 300)]
    assert not mask[0, 0, 299]
    assert found == pytest.approx([6.18, 5.18, 3.35, 1.57, 0.14], abs=0.01)


def test_critical_tokens_have_all_of_the_loss_between_them():
    generator = torch.Generator().manual_seed(1)
    inputs = credit_inputs(
        tensor([[1.0, -0.5, 0]]),
        20,
        grid=(4, 5),
        embeddings_PGTD=torch.rand(1, 3, 20, 4, generator=generator),
        guided_entropy_PGT=torch.rand(1, 3, 20, generator=generator).double(),
    )
    outputs = critical(inputs, AlgorithmConfig())
    # 6 of 20 tokens, each with 20 / 6; policy and reference are the same, so the weight is 1.
    for weight in (outputs.policy_PGT, outputs.kl_PGT):
        assert ((weight == 0) | (weight - 20 / 6 < 1e-12)).all()
        assert (weight.sum(-1) - 20).abs().max() < 1e-9
    assert outputs.metrics["credit/daw_mean"].tolist() == [[1, 1, 1]]
    release = AlgorithmConfig(preset="release")
    through = critical(inputs, AlgorithmConfig(), daw_gradient="through").policy_PGT
    assert torch.equal(critical(inputs, release).policy_PGT, through)
    detached = critical(inputs, release, daw_gradient="detached").policy_PGT
    assert torch.equal(detached, outputs.policy_PGT)
    paper = critical(inputs, AlgorithmConfig(), daw="paper")
    assert (paper.policy_PGT == 0).all()
    assert (paper.kl_PGT == outputs.kl_PGT).all()
