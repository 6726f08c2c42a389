import math

import pytest
import torch
from torch.testing import assert_close

from stage_rl.errors import InputError
from stage_rl.policies.logprobs import guide
from stage_rl.rollout.sampling import (
    Sampling,
    conditional_statistics,
    draw,
    draw_tokens,
    image_uniforms,
    invert_cdf,
)

NEXT_TO_1 = 1 - 2**-24
"""The largest fp32 number below 1."""


def streams(prompt_indices, *, seed=3, step=5, group_size=2):
    return image_uniforms(
        seed=seed, step=step, prompt_indices=prompt_indices, group_size=group_size, num_tokens=50
    )


def test_an_image_has_a_stream_of_its_own_the_same_in_any_batch():
    both = streams([4, 9], group_size=3)
    assert torch.equal(streams([9], group_size=2), both[3:5])
    assert torch.equal(streams([9, 4], group_size=3), both[[3, 4, 5, 0, 1, 2]])
    # Seed, step, prompt and image each change it.
    rows = torch.cat([streams([4]), streams([5]), streams([4], seed=4), streams([4], step=6)])
    assert rows.unique(dim=0).shape == (8, 50)
    numbers = streams(range(100), group_size=20)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # 100,000 numbers: the standard error of the mean is sqrt(1 / 12 / 1e5) = 0.0009.
    assert abs(numbers.mean() - 0.5) < 0.004


def test_the_draw_inverts_the_cumulative_distribution():
    probs_NV = torch.tensor([[0.25, 0.0, 0.25, 0.5]]).repeat(5, 1)
    # Cumulative: 0.25, 0.25, 0.5, 1.
    uniforms_N = torch.tensor([0.0, 0.24, 0.25, 0.5, NEXT_TO_1])
    assert invert_cdf(probs_NV, uniforms_N).tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.5, NEXT_TO_1, 1.0])
def test_tokens_of_probability_0_are_never_drawn(uniform):
    probs_NV = torch.zeros(3, 1000)
    probs_NV[0, 1] = probs_NV[0, 998] = 0.5
    probs_NV[1, 500] = 1
    # 1 / 300 is no fp32 number: the cumulative sum ends beside 1.
    probs_NV[2, 100:400] = 1 / 300
    tokens_N = invert_cdf(probs_NV, torch.full((3,), uniform))
    assert probs_NV[torch.arange(3), tokens_N].gt(0).all()


def test_a_single_row_is_not_scanned_alone(monkeypatch):
    """A GPU's scan of one row may fall somewhere, and what lies there has probability 0."""
    scan = torch.Tensor.cumsum

    def broken_scan(values, dim):
        sums = scan(values, dim)
        if len(values) == 1:
            sums[0, 2] = sums[0, 1] - 0.2
        return sums

    monkeypatch.setattr(torch.Tensor, "cumsum", broken_scan)
    probs_NV = torch.tensor([[0.25, 0.25, 0.0, 0.5]])
    drawn = [int(invert_cdf(probs_NV, torch.tensor([u / 16]))) for u in range(16)]
    assert drawn == [0] * 4 + [1] * 4 + [3] * 8


def test_temperature_sharpens_and_0_takes_the_likeliest():
    logits_NV = torch.tensor([[0.2, 0.8]]).log()
    # Temperature 0.5 squares the odds: 0.64 / (0.04 + 0.64) = 16 / 17.
    tokens_N, logprobs_N = draw(logits_NV, torch.tensor([0.1]), Sampling(temperature=0.5))
    assert tokens_N.tolist() == [1]
    assert_close(logprobs_N, torch.tensor([16 / 17]).log())
    tokens_N, logprobs_N = draw(logits_NV, torch.tensor([0.0]), Sampling(temperature=0))
    assert tokens_N.tolist() == [1]
    assert logprobs_N.tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        # Likeliest first: 0.4, 0.3, 0.2, 0.1. 0.4 < 0.5 takes a second; 0.7 >= 0.5 takes no third.
        ({"top_p": 0.5}, [2, 3]),
        ({"top_p": 0.1}, [3]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        # Of the best three, shares are 4/9, 3/9, 2/9: 7/9 >= 0.72 takes no third; 0.7 < 0.72 does.
        ({"top_k": 3, "top_p": 0.72}, [2, 3]),
        ({"top_p": 0.72}, [1, 2, 3]),
    ],
)
def test_tokens_are_drawn_by_their_shares_of_what_top_k_and_top_p_keep(settings, kept):
    probs_V = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniforms_N = (torch.arange(1000) + 0.5) / 1000
    logits_NV = probs_V.log().repeat(1000, 1)
    tokens_N, logprobs_N = draw(logits_NV, uniforms_N, Sampling(**settings))
    shares_V = probs_V[kept] / probs_V[kept].sum()
    assert tokens_N.unique().tolist() == kept
    # Equally spaced numbers: a count is off by the rounding of both ends.
    assert_close(tokens_N.bincount(minlength=4)[kept] / 1000, shares_V, atol=1.1e-3, rtol=0)
    assert_close(logprobs_N.exp(), probs_V[tokens_N] / probs_V[kept].sum())


@pytest.mark.parametrize(
    ("settings", "cut", "conditional"),
    [
        # Shares of .1 .2 .3 .4; the conditional ones the other way round.
        ({"top_k": 3}, 0.1, 0.4),
        ({"top_p": 0.5}, 0.3, 0.7),
        ({"top_k": 9}, 0, 0),
        # Squares over .3: the two likeliest of .01 .04 .09 .16.
        ({"top_k": 2, "temperature": 0.5}, 0.05 / 0.3, 0.7),
    ],
)
def test_the_mass_that_is_cut_by_what_is_drawn_from_and_conditionally(settings, cut, conditional):
    guided_V = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    cond_V = guided_V.flip(0)
    # Unconditional + 2 (conditional - unconditional) are the guided logits.
    logits_RV = torch.stack([cond_V, 2 * cond_V - guided_V])
    drawn = draw_tokens(logits_RV, torch.tensor([0.5]), Sampling(2.0, **settings))
    assert drawn.cut_mass_N.item() == pytest.approx(cut, abs=1e-6)
    assert drawn.cut_conditional_mass_N.item() == pytest.approx(conditional, abs=1e-6)


def test_what_is_not_cut_has_no_mass_of_it():
    for sampling in (Sampling(2.0), Sampling(2.0, temperature=0.0, top_k=3)):
        drawn = draw_tokens(torch.zeros(2, 4), torch.tensor([0.5]), sampling)
        assert drawn.cut_mass_N is None


def test_guidance_moves_from_the_unconditional_to_beyond_the_conditional():
    cond_NV, uncond_NV = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    # 1 + 5 x (2 - 1) = 6 and 1 + 5 x (0 - 1) = -4.
    assert guide(cond_NV, uncond_NV, 5.0).tolist() == [[6.0, -4.0]]
    assert guide(cond_NV, uncond_NV, 0.0).tolist() == [[1.0, 1.0]]


def test_entropy_and_logprobs_are_of_the_conditional_distribution():
    logits_NV = torch.tensor([[7.0, 7.0, 7.0, 7.0], [0.0, math.log(3), -1e9, -1e9]])
    logprobs_N, entropy_N = conditional_statistics(logits_NV, torch.tensor([2, 1]))
    # ln 4 over four equal tokens; 1/4 ln 4 + 3/4 ln (4/3) over two.
    expected = [math.log(4), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)]
    assert_close(entropy_N, torch.tensor(expected))
    assert_close(logprobs_N, torch.tensor([0.25, 0.75]).log())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("guidance_scale", -1.0), ("guidance_scale", math.inf), ("temperature", -0.1)),
        *(("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"{name}: .* is out of range"):
        Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_a_token_of_the_codebook_and_no_logprob(temperature, value):
    guided_NV = torch.full((2, 8), value)
    tokens_N, logprobs_N = draw(guided_NV, torch.tensor([0.5, NEXT_TO_1]), Sampling(1, temperature))
    assert ((tokens_N >= 0) & (tokens_N < 8)).all()
    assert not logprobs_N.isfinite().any()


@pytest.mark.parametrize("wrong", [{"guidance_scale": 1e38}, {"temperature": 1e-45}])
def test_a_number_that_fp32_does_not_bear_is_refused(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}: .* is out of range; write"):
        Sampling(**wrong)
