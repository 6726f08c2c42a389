"""Guidance-contrastive GCPO (arXiv 2605.29198): tokens count by what the prompt changes there.

The form is that of the released code (jacklishufan/gcpo); docs/method.md says where the paper
differs.

Shape suffixes: P prompts, G group, T image tokens.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.record import CreditInputs, CreditOutputs, needs, refuse_token_mask

ALPHA = math.log(1 - 0.8) / math.log(1 - 0.4) - 1
"""Exponent by which the upper 40 % of the ranks hold 80 % of the weight, 2.15."""


def _needed(*, eta: str) -> tuple[str, ...]:
    return ("exact_guidance",) if eta == "exact" else ("conditional", "unconditional")


@needs(_needed)
def guidance(
    inputs: CreditInputs,
    settings: AlgorithmConfig,
    *,
    eta: Literal["sampled", "exact"] = "sampled",
) -> CreditOutputs:
    """The weight of a token goes by the rank, within its image, of the divergence `eta` of the
    conditional from the unconditional distribution: by the sampled token, as released, or exact.
    """
    refuse_token_mask(inputs, "guidance")
    eta_PGT = inputs.guidance_kl_PGT
    if eta == "sampled":
        cond_PGT, uncond_PGT = inputs.cond_logprobs_PGT, inputs.uncond_logprobs_PGT
        assert cond_PGT is not None
        assert uncond_PGT is not None
        eta_PGT = sampled_eta(cond_PGT, uncond_PGT)
    assert eta_PGT is not None
    weight_PGT = rank_weights(eta_PGT)
    # STAGE's factor at similarity 1 - 2 w: tokens of little weight are held to the reference.
    kl_PGT = 0.5 + 0.5 * (2 - 2 * weight_PGT).clamp(0, 1)
    return CreditOutputs(weight_PGT, kl_PGT, metrics={"credit/eta": eta_PGT})


def sampled_eta(cond_PGT: Tensor, uncond_PGT: Tensor) -> Tensor:
    """min(exp(d) - d - 1, 10), d = unconditional - conditional log-probability within +-20, PGT."""
    gap_PGT = (uncond_PGT - cond_PGT).clamp(-20, 20)
    return (gap_PGT.expm1() - gap_PGT).clamp_max(10)


def rank_weights(values_PGT: Tensor) -> Tensor:
    """(rank / T)^2.15 over its mean within each image, 1 the lowest rank; equal values go by
    position. The weights of an image sum to T.
    """
    num_tokens = values_PGT.shape[-1]
    rank_PGT = values_PGT.argsort(dim=-1, stable=True).argsort(-1) + 1
    power_PGT = (rank_PGT.to(values_PGT) / num_tokens) ** ALPHA
    return power_PGT / power_PGT.mean(-1, keepdim=True)
