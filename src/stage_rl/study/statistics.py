"""What a study says of its arms: intervals, paired tests, frontiers and breakdowns; pure functions.

Shape suffixes: N seeds, M comparisons, S steps that were evaluated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

MAX_EXACT = 16
"""Most pairs whose sign flips are all gone through (2^16); of more, as many are drawn."""
FEWEST_FOR_BOOTSTRAP = 8
"""Seeds below which an interval is Student's: a bootstrap mean never leaves the values it is drawn
from, so that three of one sign would always exclude 0."""


class Estimate(NamedTuple):
    """The mean over seeds."""

    mean: float
    standard_error: float | None
    """None for a single seed."""
    interval: tuple[float, float] | None
    """95 %: Student's t below eight seeds, from there on by bias-corrected and accelerated
    bootstrap, expanded for few values; None for fewer than three."""
    num_seeds: int


def estimate(values_N: ArrayLike, *, draws: int = 9999, seed: int = 0) -> Estimate:
    """Mean, standard error and interval, Student's or BCa (Efron 1987), of values that are finite;
    without `draws` no interval.

    Drawn from ten values, means spread by sqrt(9 / 10) of what they should and have the tails of a
    normal distribution: BCa reads the percentiles that make up for both (Hesterberg 2015).
    """
    values_N = np.asarray(values_N, float)
    assert values_N.ndim == 1, values_N.shape
    assert len(values_N), "no value"
    assert np.isfinite(values_N).all(), values_N
    count, mean = len(values_N), float(values_N.mean())
    error = float(values_N.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    if error is None or count < 3 or not draws:
        return Estimate(mean, error, None, count)
    if np.ptp(values_N) == 0:  # the bootstrap has no distribution
        return Estimate(mean, error, (mean, mean), count)
    if count < FEWEST_FOR_BOOTSTRAP:
        half = float(stats.t.ppf(0.975, count - 1)) * error
        return Estimate(mean, error, (mean - half, mean + half), count)
    expanded = math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1)
    result = stats.bootstrap(
        (values_N,),
        np.mean,
        n_resamples=draws,
        confidence_level=1 - 2 * float(stats.norm.sf(expanded)),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Estimate(mean, error, (float(low), float(high)), count)


def sign_flip_p(differences_N: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p of paired differences under exact sign flips: the share of the 2^N assignments of
    signs whose mean is at least as far from 0. Five pairs cannot go below 1/16.

    Of more than `MAX_EXACT` pairs 2^16 assignments are drawn, and the observed one counts among
    them: p = (1 + those as far) / (1 + drawn), which is never 0 (Phipson and Smyth 2010).
    """
    differences_N = np.asarray(differences_N, float)
    count = len(differences_N)
    assert count, "no pair"
    far = abs(differences_N.sum()) * (1 - 1e-12)
    if count <= MAX_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return float(np.mean(np.abs(signs @ differences_N) >= far))
    signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(2**MAX_EXACT, count))
    as_far = int(np.sum(np.abs(signs @ differences_N) >= far))
    return (1 + as_far) / (1 + len(signs))


def holm(p_values_M: Sequence[float]) -> list[float]:
    """Adjusted p-values of M comparisons (Holm 1979), in their order."""
    adjusted, largest = [0.0] * len(p_values_M), 0.0
    for rank, place in enumerate(np.argsort(p_values_M, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values_M) - rank) * p_values_M[place]))
        adjusted[place] = largest
    return adjusted


def at_divergence(
    divergence_S: ArrayLike, score_S: ArrayLike, targets: Sequence[float]
) -> list[float | None]:
    """The score where a run first reached each divergence K, linear in sqrt(K) between evaluations;
    None where it never did.
    """
    root_S = np.sqrt(np.maximum.accumulate(np.asarray(divergence_S, float)))
    score_S = np.asarray(score_S, float)
    assert root_S.shape == score_S.shape, (root_S.shape, score_S.shape)
    # Where the divergence stands still the first score counts.
    first = np.concatenate([[True], np.diff(root_S) > 0])
    root_S, score_S = root_S[first], score_S[first]
    return [
        float(np.interp(math.sqrt(target), root_S, score_S))
        if math.sqrt(target) <= root_S[-1]
        else None
        for target in targets
    ]


class End(NamedTuple):
    """Where a run ends."""

    divergence: float
    """K, nats a token."""
    score: float


def above_line(end: End, one: End, other: End) -> float | None:
    """How far a score lies above the line through two others at its divergence, linear in sqrt(K),
    also beyond the two; None where these have the same divergence.
    """
    root, low, high = (math.sqrt(max(some.divergence, 0.0)) for some in (end, one, other))
    if low == high:
        return None
    return end.score - one.score - (root - low) / (high - low) * (other.score - one.score)


def is_between(end: End, one: End, other: End) -> bool:
    """Whether its divergence is between those of two others, so that their line is not drawn on."""
    low, high = sorted((one.divergence, other.divergence))
    return low <= end.divergence <= high


def breakdown_step(
    steps_S: Sequence[int],
    score_S: Sequence[float],
    divergence_S: Sequence[float],
    *,
    base: float,
    diverged_at: int | None = None,
) -> int | None:
    """The first evaluated step at which the mean of three scores is 0.05 below the base or 0.1
    below its own peak, or the divergence is above 1; a loss that is not finite breaks down too.
    """
    peak = -math.inf
    for place, step in enumerate(steps_S):
        if divergence_S[place] > 1:
            return step
        if place < 2:
            continue
        mean = float(np.mean(score_S[place - 2 : place + 1]))
        peak = max(peak, mean)
        if mean < base - 0.05 or mean < peak - 0.1:
            return step
    return diverged_at


def fluctuation(drift_S: ArrayLike) -> float:
    """How much a drift wanders beyond where it ends: (sum |D_s - D_(s-1)| - |D_S - D_0|) / S."""
    drift_S = np.asarray(drift_S, float)
    moves: NDArray[np.float64] = np.diff(drift_S)
    return float((np.abs(moves).sum() - abs(moves.sum())) / max(len(moves), 1))


def paired(
    first: Mapping[int, float], second: Mapping[int, float]
) -> tuple[list[int], NDArray[np.float64]]:
    """The seeds that both arms have, in order, and first minus second."""
    seeds = sorted(first.keys() & second.keys())
    return seeds, np.array([first[seed] - second[seed] for seed in seeds], float)
