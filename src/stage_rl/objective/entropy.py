"""Token credit by the entropy of the policy: a bonus for high entropy, or high entropy alone.

Both take the entropy of the distribution that `algorithm.logprobs` scores.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.record import CreditInputs, CreditOutputs, refuse_token_mask, refuses
from stage_rl.settings import Fraction

Form = Literal["release", "paper"]

BONUS = 0.3
"""Of the released form: factor of the entropy, and the most of an advantage that it may add."""


def _refusals(
    settings: AlgorithmConfig, num_updates: int, *, form: Form, kappa: float
) -> Iterator[tuple[str, str]]:
    if form == "release" and kappa != 1:
        yield "credit.kappa", "has no effect with form: release; write form: paper"


@refuses(_refusals)
def entropy_bonus(
    inputs: CreditInputs,
    settings: AlgorithmConfig,
    *,
    form: Form = "release",
    kappa: Fraction = 1.0,
) -> CreditOutputs:
    """EG-GRPO (arXiv 2604.02355): the least uncertain fifth of an image's tokens has no advantage,
    the most uncertain half gets a bonus for its entropy.

    `release` (minebetter/EG-GRPO) caps the bonus of a token at 0.3 of its advantage. `paper`: what
    the fifth loses, times `kappa`, is spread over the half by entropy; sums are over the group. An
    image of advantage 0 gets nothing in either.
    """
    refuse_token_mask(inputs, "entropy_bonus")
    entropy_PGT = inputs.entropy_PGT / math.log(inputs.vocab)
    sorted_PGT = entropy_PGT.sort(-1).values
    num_tokens = entropy_PGT.shape[-1]
    median_PG1 = sorted_PGT[..., num_tokens // 2, None]
    low_PGT = (entropy_PGT < sorted_PGT[..., num_tokens // 5, None]).to(entropy_PGT)
    size_PG1 = inputs.advantages_PG.abs()[:, :, None]
    if form == "release":
        high_PGT = entropy_PGT > median_PG1
        bonus_PGT = high_PGT * torch.minimum(BONUS * size_PG1, BONUS * entropy_PGT)
    else:
        high_PGT = (entropy_PGT >= median_PG1) & (size_PG1 > 0)
        paid_PGT = high_PGT * entropy_PGT
        lost_P, spread_P = (value.sum((1, 2)) for value in (size_PG1 * low_PGT, paid_PGT))
        factor_P = kappa * lost_P / spread_P.clamp_min(torch.finfo(spread_P.dtype).tiny)
        bonus_PGT = factor_P[:, None, None] * paid_PGT
    return CreditOutputs(
        policy_PGT=1 - low_PGT,
        kl_PGT=torch.ones_like(low_PGT),
        bonus_PGT=bonus_PGT,
        metrics={"credit/bonus": bonus_PGT},
    )


def high_entropy(
    inputs: CreditInputs,
    settings: AlgorithmConfig,
    *,
    share: Fraction = 0.2,
    scope: Literal["image", "group"] = "image",
) -> CreditOutputs:
    """Only the share of tokens with the highest entropy learns, of each image or of a group
    (arXiv 2506.01939); the loss is a mean over these. The KL stays on all tokens.
    """
    refuse_token_mask(inputs, "high_entropy")
    entropy_PGT = inputs.entropy_PGT
    flat = entropy_PGT if scope == "image" else entropy_PGT.flatten(1)[:, None]
    mask = most_uncertain(flat, share).to(entropy_PGT)
    policy_PGT = (mask / mask.mean(-1, keepdim=True)).view_as(entropy_PGT)
    return CreditOutputs(policy_PGT, torch.ones_like(policy_PGT))


def most_uncertain(entropy: Tensor, share: float) -> Tensor:
    """The share of the last axis, rounded up and at least one, with the highest entropy, bool; as
    many more as equal the least of them.
    """
    # Not above what is meant: 0.2 x 15 is 3.0000000000000004.
    count = max(1, math.ceil(share * entropy.shape[-1] - 1e-9))
    return entropy >= entropy.topk(count).values[..., -1:]
