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
from stage_rl.objective import AlgorithmConfig
from stage_rl.policies.base import Policy
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.batches import MicroBatch
from stage_rl.training.scoring import CONDITIONAL, Scoring, scoring_of
from stage_rl.training.update import Precision, measure
from stage_rl.types import Measured, Rollout


def mismatch_metrics(logprobs_NT: Tensor, sampler_NT: Tensor, kind: str) -> dict[str, float]:
    """Mean and largest |difference| of log-probabilities (nats), and the mean importance weight,
    the trainer's over the sampler's probability of a token. `kind` is as `algorithm.logprobs` is.
    """
    name = "logprobs" if kind == "conditional" else "guided_logprobs"
    logprobs_NT, sampler_NT = logprobs_NT.cpu(), sampler_NT.cpu()
    gap_NT = (logprobs_NT - sampler_NT).abs()
    return {
        f"mismatch/{name}_mean": gap_NT.mean().item(),
        f"mismatch/{name}_max": gap_NT.max().item(),
        f"mismatch/{name}_weight": importance_ratio(logprobs_NT, sampler_NT).mean().item(),
    }


def trained_mismatch(
    measured: Measured, rollout: Rollout, settings: AlgorithmConfig
) -> dict[str, float]:
    """The mismatch of all images under the trained distribution, whose log-probabilities the step
    has anyway; where importance weights are truncated, also the share of those above the cap.
    """
    conditional = settings.logprobs == "conditional"
    sampler_NT = rollout.logprobs_NT if conditional else rollout.guided_logprobs_NT
    if sampler_NT is None:
        return {}
    numbers = mismatch_metrics(measured.logprobs_NT, sampler_NT, settings.logprobs)
    if settings.importance_sampling == "truncated":
        weight_NT = importance_ratio(measured.logprobs_NT.cpu(), sampler_NT.cpu())
        capped_NT = weight_NT > settings.importance_cap
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
    return mismatch_metrics(measured.logprobs_NT, sampler_NT, other.logprobs)


def _other_scoring(scoring: Scoring, sampling: Sampling) -> Scoring | None:
    truncated = sampling.top_k or sampling.top_p < 1
    if truncated or (sampling.guidance_scale, sampling.temperature) == (1, 1):
        return None
    if scoring.logprobs != "conditional":
        return CONDITIONAL
    return scoring_of("guided_detached", sampling)
