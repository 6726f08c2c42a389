"""Statistics of a study, against numbers worked by hand."""

import math

import numpy as np
import pytest

from stage_rl.study.statistics import (
    End,
    above_line,
    at_divergence,
    breakdown_step,
    estimate,
    fluctuation,
    holm,
    paired,
    sign_flip_p,
)


def test_an_estimate_has_mean_error_and_interval():
    result = estimate([1.0, 2.0, 3.0, 4.0])
    # std 1.291, over sqrt(4)
    assert (result.mean, result.num_seeds) == (2.5, 4)
    assert result.standard_error == pytest.approx(0.6455, abs=1e-4)
    # t of 3 degrees of freedom 3.1824, times 0.6455
    assert result.interval == pytest.approx((2.5 - 2.0543, 2.5 + 2.0543), abs=1e-3)


def test_three_values_of_one_sign_do_not_exclude_0_by_themselves():
    # Mean 0.2, std 0.1, over sqrt(3): 0.0577; t of 2 degrees of freedom 4.3027.
    assert estimate([0.1, 0.2, 0.3]).interval == pytest.approx((-0.0484, 0.4484), abs=1e-4)


@pytest.mark.parametrize("count", [3, 4, 7])
def test_the_interval_of_few_values_covers_the_mean_as_often_as_it_says(count):
    # A bootstrap of three values excludes their mean in at least 2 * 2^-3 of all cases.
    samples = np.random.default_rng(0).normal(size=(2000, count))
    intervals = [estimate(sample).interval for sample in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(
    ("values", "error", "interval"),
    [([2.0], None, None), ([1.0, 3.0], 1.0, None), ([2.0, 2.0, 2.0], 0.0, (2.0, 2.0))],
)
def test_few_or_equal_values_have_no_invented_interval(values, error, interval):
    result = estimate(values)
    assert result.standard_error == (None if error is None else pytest.approx(error))
    assert result.interval == interval


def test_without_draws_there_is_no_interval():
    # std 1.5275, over sqrt(3)
    result = estimate([1.0, 2.0, 4.0], draws=0)
    assert result[:2] == (pytest.approx(7 / 3), pytest.approx(0.8819, abs=1e-4))
    assert result.interval is None


def test_the_bca_interval_covers_the_mean_as_often_as_it_says():
    # Of ten values it covers 0.90 without its expansion.
    samples = np.random.default_rng(0).normal(size=(2000, 10))
    intervals = [
        estimate(sample, draws=499, seed=seed).interval for seed, sample in enumerate(samples)
    ]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_sign_flips_are_exact():
    # Of 2^3 assignments the observed one and its mirror are the farthest.
    assert sign_flip_p([1.0, 2.0, 3.0]) == 2 / 8
    # Five pairs cannot go below 1 / 16.
    assert sign_flip_p([1.0] * 5) == 2 / 32
    # Sums of (1, -1): 0 is reached by all four.
    assert sign_flip_p([1.0, -1.0]) == 1
    assert sign_flip_p(np.ones(10)) == 2 / 1024


def test_sign_flips_of_many_pairs_are_drawn():
    rng = np.random.default_rng(0)
    exact = rng.normal(0.4, 1, size=16)
    # A 17th pair of 0 changes no sum: the p of the other sixteen is known exactly.
    drawn = sign_flip_p([*exact, 0.0])
    assert drawn == pytest.approx(sign_flip_p(exact), abs=0.01)
    assert drawn == sign_flip_p([*exact, 0.0])
    # Never 0, however many pairs there are.
    assert sign_flip_p(np.ones(40)) == 1 / (1 + 2**16)


def test_holm_multiplies_by_what_is_left_and_never_falls():
    # Sorted 0.01 x 3, 0.02 x 2, 0.03 x 1 -> 0.03, 0.04, 0.04
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_scores_at_equal_divergence_are_linear_in_its_root():
    # sqrt K = 0, 0.1, 0.2 with scores 0.3, 0.4, 0.6: at 0.15 half way, 0.5.
    found = at_divergence([0, 0.01, 0.04], [0.3, 0.4, 0.6], [0.0225, 0.01, 0.09])
    assert found == [pytest.approx(0.5), pytest.approx(0.4), None]


def test_a_divergence_that_falls_again_counts_where_it_was_first_reached():
    assert at_divergence([0, 0.04, 0.01], [0.3, 0.5, 0.9], [0.04]) == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    ("divergence", "line"),
    # sqrt K = 0.1 and 0.2 with scores 0.3 and 0.5: slope 2, on both sides of the two.
    [(0.0225, 0.4), (0.0625, 0.6), (0.0025, 0.2)],
)
def test_a_score_is_compared_with_a_line_at_its_divergence(divergence, line):
    one, other = End(0.01, 0.3), End(0.04, 0.5)
    assert above_line(End(divergence, 0.45), one, other) == pytest.approx(0.45 - line)
    assert above_line(End(divergence, 0.45), one, one) is None


@pytest.mark.parametrize(
    ("scores", "divergences", "diverged_at", "expected"),
    [
        ([0.3, 0.32, 0.34, 0.35], [0.1] * 4, None, None),
        ([0.3, 0.2, 0.2, 0.2], [0.1] * 4, None, 30),  # mean 0.233 < 0.3 - 0.05
        ([0.5, 0.5, 0.5, 0.2], [0.1] * 4, None, 40),  # mean 0.4 is 0.1 below 0.5, just not under
        ([0.3, 0.3, 0.3, 0.3], [0.1, 1.1, 0.1, 0.1], None, 20),
        ([0.3, 0.3, 0.3, 0.3], [0.1] * 4, 41, 41),
    ],
)
def test_a_run_breaks_down_by_score_divergence_or_loss(scores, divergences, diverged_at, expected):
    found = breakdown_step([10, 20, 30, 40], scores, divergences, base=0.3, diverged_at=diverged_at)
    assert found == expected


def test_a_drift_that_goes_straight_does_not_fluctuate():
    assert fluctuation([0.0, 0.1, 0.2]) == pytest.approx(0)
    # |0.2| + |-0.2| + |0.1| - |0.1| = 0.4, over 3
    assert fluctuation([0.0, 0.2, 0.0, 0.1]) == pytest.approx(0.4 / 3)


def test_arms_are_paired_by_seed():
    seeds, differences = paired({1: 0.5, 2: 0.4, 3: 0.1}, {2: 0.1, 1: 0.3})
    assert seeds == [1, 2]
    assert differences.tolist() == pytest.approx([0.2, 0.3])
    assert not math.isnan(differences.sum())
