"""How far the sampler's log-probabilities are from the trainer's.

The sampler computes with its own copies and kernels, so the policy that drew the images is not to
the last bit the one that trains. Both are compared under one kind of distribution at a time, the
conditional or the guided.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stage_rl.algorithm import importance_ratio
from stage_rl.policies.base import Policy
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.batches import MicroBatch
from stage_rl.training.scoring import CONDITIONAL, Scoring, scoring_of
from stage_rl.training.update import Precision, measure

NAMES = {
    "conditional": "logprobs",
    "guided": "guided_logprobs",
    "guided_detached": "guided_logprobs",
}


def mismatch_metrics(logprobs_NT: Tensor, sampler_NT: Tensor, scoring: Scoring) -> dict[str, float]:
    """Mean and largest |difference| of log-probabilities (nats), and the mean importance weight,
    the trainer's over the sampler's probability of a token.
    """
    name = NAMES[scoring.logprobs]
    logprobs_NT, sampler_NT = logprobs_NT.cpu(), sampler_NT.cpu()
    gap_NT = (logprobs_NT - sampler_NT).abs()
    return {
        f"mismatch/{name}_mean": gap_NT.mean().item(),
        f"mismatch/{name}_max": gap_NT.max().item(),
        f"mismatch/{name}_weight": importance_ratio(logprobs_NT, sampler_NT).mean().item(),
    }


def trained_mismatch(
    logprobs_NT: Tensor, batches: list[MicroBatch], scoring: Scoring, *, cap: float | None
) -> dict[str, float]:
    """The mismatch of all images under the trained distribution, whose log-probabilities the step
    has anyway; with a `cap`, also the share of importance weights above it.
    """
    sampled = [batch.sampler_logprobs_of(scoring.logprobs) for batch in batches]
    known = [values for values in sampled if values is not None]
    if len(known) < len(sampled):
        return {}
    sampler_NT = torch.cat(known)
    numbers = mismatch_metrics(logprobs_NT, sampler_NT, scoring)
    if cap is not None:
        capped_NT = importance_ratio(logprobs_NT, sampler_NT) > cap
        numbers["mismatch/capped"] = capped_NT.float().mean().item()
    return numbers


@torch.no_grad()
def untrained_mismatch(
    policy: Policy,
    batch: MicroBatch,
    precision: Precision,
    *,
    sampling: Sampling,
    num_images: int,
) -> dict[str, float]:
    """The mismatch of the first `num_images` of a batch, at most a group, under the distribution
    that is not trained. Nothing where it is the trained one, or was truncated by top-k or top-p.
    """
    other = _other_scoring(precision.scoring, sampling)
    few = batch.first_images(num_images)
    if other is None or few is None:
        return {}
    sampler_NT = few.sampler_logprobs_of(other.logprobs)
    if sampler_NT is None:
        return {}
    measured = measure(policy, few, replace(precision, scoring=other))
    return mismatch_metrics(measured.logprobs_NT, sampler_NT, other)


def _other_scoring(scoring: Scoring, sampling: Sampling) -> Scoring | None:
    truncated = sampling.top_k or sampling.top_p < 1
    if truncated or (sampling.guidance_scale, sampling.temperature) == (1, 1):
        return None
    if scoring.logprobs != "conditional":
        return CONDITIONAL
    return scoring_of("guided_detached", sampling)
