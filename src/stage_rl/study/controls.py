"""Control arms: what STAGE would be if the thing it claims to use did not matter."""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.objective.record import CreditInputs, CreditOutputs
from stage_rl.objective.stage import stage


def permuted_stage(inputs: CreditInputs, settings: AlgorithmConfig) -> CreditOutputs:
    """STAGE with the weights of each image permuted over its positions.

    The weights keep their mean and spread in every image and lose their place: what is left of the
    gain does not come from which tokens look alike. The permutation follows from the image's codes.
    """
    weights = stage(inputs, settings)
    order_PGT = torch.stack(
        [torch.stack([_order(codes_TC) for codes_TC in group]) for group in inputs.codes_PGTC]
    ).to(weights.policy_PGT.device)
    return replace(
        weights,
        policy_PGT=weights.policy_PGT.gather(-1, order_PGT),
        kl_PGT=weights.kl_PGT.gather(-1, order_PGT),
    )


def _order(codes_TC: Tensor) -> Tensor:
    """A permutation of T positions, the same for the same codes wherever they are computed."""
    seed = zlib.crc32(codes_TC.float().cpu().contiguous().numpy().tobytes())
    return torch.randperm(len(codes_TC), generator=torch.Generator().manual_seed(seed))
