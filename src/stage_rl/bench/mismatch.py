"""`stage bench mismatch`: what the engine and the trainer say of the same tokens.

The trainer learns from log-probabilities of its own, so the engine's copies and kernels may differ
a little; guidance multiplies independent differences.

Shape suffixes: N images, T image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage_rl.bench.base import BenchResult, at_least, check_guided
from stage_rl.bench.models import LONG_TEXT, SIZES, TEXT, bench_device, policy_of
from stage_rl.policies.janus import JanusPolicy
from stage_rl.policies.logprobs import CONDITIONAL
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.update import Precision, measure, micro_batches
from stage_rl.types import Prompt, Rollout

BAR = "conditional log-probabilities: largest difference <= 1e-4 in fp32, mean <= 0.03 mixed"
MOST_IN_FP32 = 1e-4
MOST_MEAN_MIXED = 0.03
KINDS = ("logprobs", "guided_logprobs", "entropy")


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
    settings = dict(locals())
    at_least(1, num_prompts=num_prompts, group_size=group_size)
    at_least(0, seed=seed)
    check_guided(guidance_scale)
    policy = policy_of(model, bench_device())
    words = LONG_TEXT if model in SIZES else TEXT
    prompts = [Prompt(words, index) for index in range(num_prompts)]
    sampling = Sampling(guidance_scale=guidance_scale)
    dtypes = ("mixed",) if model in SIZES else ("float32", "mixed")
    measures: dict[str, float] = {}
    for dtype in dtypes:
        drawn = rollout(
            Engine(policy, dtype=dtype),
            prompts,
            group_size=group_size,
            sampling=sampling,
            seed=seed,
            step=0,
        )
        for kind, gap in differences(policy, drawn, sampling, mixed=dtype == "mixed").items():
            measures[f"{dtype}_{kind}_mean"] = gap.mean().item()
            measures[f"{dtype}_{kind}_max"] = gap.max().item()
    return BenchResult(
        name="mismatch",
        headline=_headline(measures, dtypes),
        bar=BAR,
        reached=_reached(measures),
        settings=settings,
        measures=measures,
        table=_table(measures, dtypes),
    )


@torch.no_grad()
def differences(
    policy: JanusPolicy, drawn: Rollout, sampling: Sampling, *, mixed: bool
) -> dict[str, Tensor]:
    """|engine - trainer| of every token by kind, NT (nats); the trainer works group by group."""
    theirs: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for batch in micro_batches(drawn, 1, policy.device):
        guided = sampling.scoring("guided_detached")
        conditional = measure(policy, batch, Precision(mixed=mixed, scoring=CONDITIONAL))
        theirs["logprobs"].append(conditional.logprobs_NT)
        theirs["entropy"].append(conditional.entropy_NT)
        measured = measure(policy, batch, Precision(mixed=mixed, scoring=guided))
        theirs["guided_logprobs"].append(measured.logprobs_NT)
    ours = {
        "logprobs": drawn.logprobs_NT,
        "guided_logprobs": drawn.guided_logprobs_NT,
        "entropy": drawn.entropy_NT,
    }
    gaps = {}
    for kind in KINDS:
        mine = ours[kind]
        assert mine is not None
        gaps[kind] = (mine - torch.cat(theirs[kind])).abs()
    return gaps


def _headline(measures: dict[str, float], dtypes: tuple[str, ...]) -> str:
    parts = []
    if "float32" in dtypes:
        parts.append(f"fp32 conditional at most {measures['float32_logprobs_max']:.0e}")
    parts.append(
        f"mixed conditional {measures['mixed_logprobs_mean']:.4f} in the mean, "
        f"guided {measures['mixed_guided_logprobs_mean']:.4f}"
    )
    return ", ".join(parts)


def _reached(measures: dict[str, float]) -> bool:
    return (
        measures.get("float32_logprobs_max", 0.0) <= MOST_IN_FP32
        and measures["mixed_logprobs_mean"] <= MOST_MEAN_MIXED
    )


def _table(measures: dict[str, float], dtypes: tuple[str, ...]) -> tuple[str, ...]:
    lines = [f"{'precision':<10}{'of':<17}{'mean':>10}{'max':>10}"]
    for dtype in dtypes:
        for kind in KINDS:
            mean, largest = (measures[f"{dtype}_{kind}_{what}"] for what in ("mean", "max"))
            lines.append(f"{dtype:<10}{kind:<17}{mean:>10.1e}{largest:>10.1e}")
    return tuple(lines)
