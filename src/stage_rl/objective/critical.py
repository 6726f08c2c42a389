"""GCPO (arXiv 2509.22485): three tenths of the tokens learn, chosen by place, outline and variety.

Settings and selection are those of the released code (zghhui/GCPO); docs/method.md says where the
paper differs.

Shape suffixes: P prompts, G group, T image tokens, D model width, R x C rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.errors import RecipeError
from stage_rl.objective.record import CreditInputs, CreditOutputs, needs, refuse_token_mask, refuses

Daw = Literal["release", "paper", "none"]
DawGradient = Literal["detached", "through"]

DAW_CLIP = 0.5
"""Largest size of the difference of log-probabilities that a weight is made of."""


def _refusals(
    settings: AlgorithmConfig, num_updates: int, *, daw: Daw, daw_gradient: DawGradient | None
) -> Iterator[tuple[str, str]]:
    through = _goes_through(settings, daw_gradient)
    if daw == "none" and daw_gradient == "through":
        text = "has no effect with daw: none; write detached, or daw: release"
        yield "credit.daw_gradient", text
    if daw != "none" and through and num_updates > 1:
        text = "through is the gradient of one update per rollout; write detached, or "
        yield "credit.daw_gradient", f"{text}optimizer.updates_per_rollout=1"
    if daw == "paper" and not through and settings.entropy.mode != "loss":
        text = "paper is 0 where policy and reference are the same, as they are at first, and so "
        yield "credit.daw", f"{text}they stay; write release, or daw_gradient: through"


def _goes_through(settings: AlgorithmConfig, daw_gradient: DawGradient | None) -> bool:
    """Whether the dynamic weight has a gradient: as is said, else with the preset `release`."""
    return (daw_gradient or ("through" if settings.preset == "release" else "")) == "through"


@needs("embeddings", "guided_entropy")
@refuses(_refusals)
def critical(
    inputs: CreditInputs,
    settings: AlgorithmConfig,
    *,
    daw: Daw = "release",
    daw_gradient: DawGradient | None = None,
) -> CreditOutputs:
    """GCPO: the critical tokens alone have an advantage and a KL, times T over their number.

    The advantage is weighted by how far the policy has moved from the reference up to the token
    (`daw`). `through` adds what a gradient through that weight would give, at ratio 1: exact for
    one update per rollout; None: with the preset `release`. `paper` without the exponential learns
    nothing while policy and reference are the same.
    """
    refuse_token_mask(inputs, "critical")
    entropy_PGT, embeds_PGTD = inputs.guided_entropy_PGT, inputs.embeddings_PGTD
    assert entropy_PGT is not None
    assert embeds_PGTD is not None
    chosen = critical_tokens(entropy_PGT, group_similarity(embeds_PGTD), inputs.grid)
    selected_PGT = chosen.first_PGT | chosen.struct_PGT | chosen.sim_PGT
    mask_PGT = selected_PGT.to(inputs.logprobs_PGT)
    factor_PGT, weight_PGT = advantage_weights(
        inputs.logprobs_PGT - inputs.ref_logprobs_PGT,
        mask_PGT,
        form=daw,
        through=_goes_through(settings, daw_gradient),
    )
    scale = mask_PGT.shape[-1] / mask_PGT[0, 0].sum()
    num_PG = mask_PGT.sum(-1)
    return CreditOutputs(
        policy_PGT=factor_PGT * scale,
        kl_PGT=mask_PGT * scale,
        metrics={
            "credit/first": chosen.first_PGT,
            "credit/struct": chosen.struct_PGT,
            "credit/sim": chosen.sim_PGT,
            "credit/overlap": chosen.overlap_PGT,
            "credit/daw_mean": (mask_PGT * weight_PGT).sum(-1) / num_PG,
            "credit/daw_max": (mask_PGT * weight_PGT).amax(-1),
        },
    )


class CriticalTokens(NamedTuple):
    """Disjoint sets of T // 10 tokens of each image, bool."""

    first_PGT: Tensor
    struct_PGT: Tensor
    """Where the smoothed entropy changes most."""
    sim_PGT: Tensor
    """Where the images of the group differ most."""
    overlap_PGT: Tensor
    """Tokens of another set that would be of the last one too."""


def critical_tokens(
    entropy_PGT: Tensor, similarity_PT: Tensor, grid: tuple[int, int]
) -> CriticalTokens:
    """The tokens of each kind, k = T // 10: the first k; the k steepest of the smoothed entropy,
    neither in the first nor in the last tenth; the k least similar of what is left.

    Equal values go by position. A RecipeError for fewer than ten tokens.
    """
    num_tokens = entropy_PGT.shape[-1]
    k = num_tokens // 10
    if not k:
        raise RecipeError(
            f"algorithm.credit: critical takes a tenth of the tokens and the policy has "
            f"{num_tokens}; write uniform or stage"
        )
    first_PGT = torch.zeros_like(entropy_PGT, dtype=torch.bool)
    first_PGT[..., :k] = True
    window_T = torch.zeros_like(first_PGT[0, 0])
    window_T[k : k + 8 * num_tokens // 10] = True
    steepness_PGT = entropy_steepness(entropy_PGT.unflatten(-1, grid)).flatten(-2)
    struct_PGT = _smallest(-steepness_PGT, k, allowed=window_T.expand_as(first_PGT))
    taken_PGT = first_PGT | struct_PGT
    spread_PGT = similarity_PT[:, None].expand_as(entropy_PGT)
    anywhere_PGT = _smallest(spread_PGT, k, allowed=torch.ones_like(taken_PGT))
    return CriticalTokens(
        first_PGT,
        struct_PGT,
        _smallest(spread_PGT, k, allowed=~taken_PGT),
        anywhere_PGT & taken_PGT,
    )


def entropy_steepness(entropy_PGRC: Tensor) -> Tensor:
    """Size of the gradient of the smoothed entropy map, PGRC: central differences, one-sided at the
    border. Smoothed is the mean of a cell and its neighbours left, up-left, up and up-right.
    """
    ones = torch.ones_like(entropy_PGRC)
    smooth = _with_neighbours(entropy_PGRC) / _with_neighbours(ones)
    slopes = (
        torch.gradient(smooth, dim=dim)[0] if smooth.shape[dim] > 1 else torch.zeros_like(smooth)
        for dim in (-2, -1)
    )
    return torch.hypot(*slopes)


def group_similarity(vectors_PGTD: Tensor) -> Tensor:
    """Mean cosine over all pairs of different images of a group at each position, similarity_PT."""
    size = vectors_PGTD.shape[1]
    dtype = torch.promote_types(vectors_PGTD.dtype, torch.float32)
    unit_PGTD = normalize(vectors_PGTD.to(dtype), dim=-1)
    # |sum of unit vectors|^2 is the sum of all cosines, those of an image with itself among them.
    return (unit_PGTD.sum(1).square().sum(-1) - size) / (size * (size - 1))


def advantage_weights(
    moved_PGT: Tensor, mask_PGT: Tensor, *, form: Daw, through: bool
) -> tuple[Tensor, Tensor]:
    """What each token's advantage is multiplied by, and the dynamic advantage weight alone, PGT.

    `moved_PGT` is the log-probability minus the reference's. The weight is the mean over the tokens
    so far of exp(clip(moved)), in the paper of clip(moved). `through`: a token's gradient is also
    that of the weights of those behind it. The factor of token j is then, m the mask and D `moved`,

        c_j = m_j w_j + exp(clip D_j) 1[|D_j| <= 0.5] sum over t >= j of m_t / t

    with 1 in place of exp(clip D_j) in the paper.
    """
    if form == "none":
        return mask_PGT, torch.ones_like(mask_PGT)
    places_T = torch.arange(1, mask_PGT.shape[-1] + 1).to(mask_PGT)
    clipped_PGT = moved_PGT.clamp(-DAW_CLIP, DAW_CLIP)
    terms_PGT = clipped_PGT.exp() if form == "release" else clipped_PGT
    weight_PGT = terms_PGT.cumsum(-1) / places_T
    factor_PGT = mask_PGT * weight_PGT
    if through:
        slope_PGT = (moved_PGT.abs() <= DAW_CLIP) * (
            terms_PGT if form == "release" else torch.ones_like(terms_PGT)
        )
        behind_PGT = (mask_PGT / places_T).flip(-1).cumsum(-1).flip(-1)
        factor_PGT = factor_PGT + slope_PGT * behind_PGT
    return factor_PGT, weight_PGT


def _smallest(values_PGT: Tensor, k: int, *, allowed: Tensor) -> Tensor:
    """The k smallest of the allowed tokens, bool; the first of equal ones."""
    order_PGT = values_PGT.masked_fill(~allowed, torch.inf).argsort(dim=-1, stable=True)
    chosen_PGT = torch.zeros_like(allowed)
    return chosen_PGT.scatter(-1, order_PGT[..., :k], True) & allowed


def _with_neighbours(map_PGRC: Tensor) -> Tensor:
    """Sum of a cell and its neighbours left, up-left, up and up-right."""
    padded = pad(map_PGRC, (1, 1, 1, 0))
    rows, columns = map_PGRC.shape[-2:]
    above = padded[..., :rows, :]
    left = padded[..., 1:, :columns]
    return map_PGRC + left + sum(above[..., c : c + columns] for c in range(3))
