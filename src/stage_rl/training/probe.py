"""Drift from the reference on a fixed set of its own samples.

The entropy of a step's own samples moves with its prompts; on a fixed set it moves with the policy
alone. The divergence is exact: the sum over the whole codebook at every token.

Shape suffixes: N completions, T image tokens, R rows of a chunk, W width of a row, V codebook size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stage_rl.algorithm import exact_kl, token_entropy
from stage_rl.policies.base import Policy
from stage_rl.training.batches import MicroBatch
from stage_rl.training.update import Precision, trunk_states


@dataclass(frozen=True)
class Drift:
    """Means over all tokens of the probe set, nats."""

    kl: float
    """KL(policy || reference)."""
    entropy: float
    """Entropy of the policy minus that of the reference."""


@torch.no_grad()
def measure_drift(
    policy: Policy, reference: Policy, batch: MicroBatch, precision: Precision
) -> Drift:
    """How far the policy has moved, on samples of the reference, under the scored distribution."""
    states = [trunk_states(model, batch, precision).flatten(0, 1) for model in (policy, reference)]
    kl, entropy = [], []
    for rows_RW, ref_rows_RW in zip(
        *(s.split(precision.logprob_rows) for s in states), strict=True
    ):
        logits_RV = precision.scoring.head(policy)(rows_RW).float()
        ref_logits_RV = precision.scoring.head(reference)(ref_rows_RW).float()
        kl.append(exact_kl(logits_RV, ref_logits_RV))
        entropy.append(token_entropy(logits_RV) - token_entropy(ref_logits_RV))
    return Drift(torch.cat(kl).mean().item(), torch.cat(entropy).mean().item())
