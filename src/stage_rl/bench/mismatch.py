"""`stage bench mismatch`: what the engine and the trainer say of the same tokens.

The trainer learns from log-probabilities of its own, so the engine's copies and kernels may differ
a little; guidance multiplies independent differences.

Shape suffixes: N images, T image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_rl.bench.base import BenchResult, benchmark, check_guided, columns
from stage_rl.bench.models import SIZES, policy_of, prompts_of
from stage_rl.distributed import pick_device
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import CONDITIONAL
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.update import Precision, measure, micro_batches
from stage_rl.types import Rollout

BAR = "conditional log-probabilities: largest difference <= 1e-4 in fp32, mean <= 0.03 mixed"
MOST_IN_FP32 = 1e-4
MOST_MEAN_MIXED = 0.03
KINDS = ("logprobs", "guided_logprobs", "entropy")


@benchmark(BAR)
def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 2,
    guidance_scale: float = 5.0,
    seed: int = 0,
) -> BenchResult:
    """Samples images in both precisions and scores them by teacher forcing in the same precision.

    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights
    (mixed alone).
    """
    check_guided(guidance_scale)
    policy, prompts = policy_of(model, pick_device("auto")), prompts_of(model, num_prompts)
    sampling = Sampling(guidance_scale=guidance_scale)
    measures: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [("precision", "of", "mean", "max")]
    for dtype in ("mixed",) if model in SIZES else ("float32", "mixed"):
        engine = Engine(policy, dtype=dtype)
        rollout = sample_rollout(
            engine, prompts, group_size=group_size, sampling=sampling, seed=seed, step=0
        )
        gaps = differences(policy, rollout, sampling, mixed=dtype == "mixed")
        for kind, gap_NT in gaps.items():
            mean, largest = gap_NT.mean().item(), gap_NT.max().item()
            measures |= {f"{dtype}_{kind}_mean": mean, f"{dtype}_{kind}_max": largest}
            rows.append((dtype, kind, f"{mean:.1e}", f"{largest:.1e}"))
    return BenchResult(_headline(measures), _reached(measures), measures, columns(*rows))


@torch.no_grad()
def differences(
    policy: Policy, rollout: Rollout, sampling: Sampling, *, mixed: bool
) -> dict[str, Tensor]:
    """|engine - trainer| of every token by kind, NT (nats); the trainer works group by group."""
    theirs: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    guided = Precision(mixed=mixed, scoring=sampling.scoring("guided_detached"))
    for batch in micro_batches(rollout, 1, policy.device):
        measured = measure(policy, batch, Precision(mixed=mixed, scoring=CONDITIONAL))
        theirs["logprobs"].append(measured.logprobs_NT)
        theirs["entropy"].append(measured.entropy_NT)
        theirs["guided_logprobs"].append(measure(policy, batch, guided).logprobs_NT)
    return {
        kind: (getattr(rollout, f"{kind}_NT") - torch.cat(theirs[kind])).abs() for kind in KINDS
    }


def _headline(measures: dict[str, float]) -> str:
    text = (
        f"mixed conditional {measures['mixed_logprobs_mean']:.4f} in the mean, "
        f"guided {measures['mixed_guided_logprobs_mean']:.4f}"
    )
    if "float32_logprobs_max" in measures:
        text = f"fp32 conditional at most {measures['float32_logprobs_max']:.0e}, {text}"
    return text


def _reached(measures: dict[str, float]) -> bool:
    return (
        measures.get("float32_logprobs_max", 0.0) <= MOST_IN_FP32
        and measures["mixed_logprobs_mean"] <= MOST_MEAN_MIXED
    )
