"""`stage bench mismatch`: what the engine and the trainer say of the same tokens.

The trainer learns from log-probabilities of its own, so the engine's copies and kernels may differ
a little; guidance multiplies independent differences.

Shape suffixes: N images, T image tokens.
"""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor

from stage_rl.bench.base import BenchResult, Guidance, flat, table
from stage_rl.bench.models import SIZES, policy_of, prompts_of
from stage_rl.distributed import pick_device
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import CONDITIONAL
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.settings import Seed
from stage_rl.training.measure import Precision, measure, micro_batches
from stage_rl.types import Rollout

BAR = "conditional log-probabilities: largest difference <= 1e-4 in fp32, mean <= 0.03 mixed"
MAX_FP32 = 1e-4
MAX_MIXED_MEAN = 0.03


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 8,
    group_size: PositiveInt = 2,
    guidance_scale: Guidance = 5.0,
    seed: Seed = 0,
) -> BenchResult:
    """Samples images in both precisions and scores them by teacher forcing in the same precision;
    `fp8` is the mix with a cache in 8 bits.

    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights
    (without fp32).
    """
    policy, prompts = policy_of(model, pick_device("auto")), prompts_of(model, num_prompts)
    sampling = Sampling(guidance_scale=guidance_scale)
    rows: dict[str, dict[str, float]] = {}
    for name in ("mixed", "fp8") if model in SIZES else ("float32", "mixed", "fp8"):
        dtype = "mixed" if name == "fp8" else name
        rollout = sample_rollout(
            Engine(policy, dtype=dtype, cache_dtype="fp8" if name == "fp8" else "auto"),
            prompts,
            group_size=group_size,
            sampling=sampling,
            seed=seed,
            step=0,
        )
        for kind, gap_NT in differences(policy, rollout, sampling, mixed=dtype == "mixed").items():
            rows[f"{name}_{kind}"] = {"mean": gap_NT.mean().item(), "max": gap_NT.max().item()}
    measures = flat(rows)
    headline = (
        f"mixed conditional {measures['mixed_logprobs_mean']:.4f} in the mean, "
        f"guided {measures['mixed_guided_logprobs_mean']:.4f}, "
        f"with a cache in fp8 {measures['fp8_logprobs_mean']:.4f}"
    )
    if "float32_logprobs_max" in measures:
        headline = f"fp32 conditional at most {measures['float32_logprobs_max']:.0e}, {headline}"
    lines = table(rows, {"mean": ".1e", "max": ".1e"})
    return BenchResult(headline, _reached(measures), measures, lines)


@torch.no_grad()
def differences(
    policy: Policy, rollout: Rollout, sampling: Sampling, *, mixed: bool
) -> dict[str, Tensor]:
    """|engine - trainer| of every token by kind, NT (nats); the trainer works group by group."""
    plain = Precision(mixed=mixed, scoring=CONDITIONAL)
    guided = Precision(mixed=mixed, scoring=sampling.scoring("guided_detached"))
    theirs: dict[str, list[Tensor]] = {"logprobs": [], "guided_logprobs": [], "entropy": []}
    for batch in micro_batches(rollout, 1, policy.device):
        measured = measure(policy, batch, plain)
        theirs["logprobs"].append(measured.logprobs_NT)
        theirs["entropy"].append(measured.entropy_NT)
        theirs["guided_logprobs"].append(measure(policy, batch, guided).logprobs_NT)
    return {
        kind: (getattr(rollout, f"{kind}_NT") - torch.cat(parts)).abs()
        for kind, parts in theirs.items()
    }


def _reached(measures: dict[str, float]) -> bool:
    return (
        measures.get("float32_logprobs_max", 0.0) <= MAX_FP32
        and measures["mixed_logprobs_mean"] <= MAX_MIXED_MEAN
    )
