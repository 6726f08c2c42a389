"""The numbers of one step, flat, under the names that console, file and report share.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from stage_rl.algorithm import equal_reward_groups, importance_ratio
from stage_rl.algorithm_config import AlgorithmConfig
from stage_rl.distributed import World
from stage_rl.files import replace_file
from stage_rl.objective.credit import TokenCredit
from stage_rl.pictures import image_boxes, image_grid
from stage_rl.policies.base import Policy
from stage_rl.policies.logprobs import CONDITIONAL, Scoring
from stage_rl.rollout.attention import BLOCK
from stage_rl.rollout.decoder import Decoder
from stage_rl.rollout.engine import PassStats
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.measure import MicroBatch, Precision, measure
from stage_rl.training.run import RunFolder
from stage_rl.training.update import UpdateStats, total_losses
from stage_rl.types import Measured, Rewards, Rollout


@dataclass(frozen=True)
class Step:
    """What one pass of the loop leaves; rewards and numbers are those of all ranks."""

    number: int
    """Counted from 0."""
    rollout: Rollout
    rewards: Rewards
    reference: Measured
    learned: UpdateStats | None
    """None where a reward failed on every group."""
    numbers: dict[str, float]
    """The step's metrics, without its times."""
    timer: Timer
    fixed: Rollout | None = None
    """The fixed prompts, drawn by the policy that drew the rollout; the same on all ranks."""

    def of_all_ranks(self, world: World) -> Step:
        """The same with the samples of all ranks, whose parts are in the order of the groups."""
        learned = self.learned and replace(
            self.learned,
            measured=world.concat(self.learned.measured),
            credit=world.concat(self.learned.credit),
        )
        rollout, reference = world.concat(self.rollout), world.concat(self.reference)
        return replace(self, rollout=rollout, reference=reference, learned=learned)


def reward_metrics(rewards: Rewards) -> dict[str, float]:
    """What the rewards said; a column that applies to no image is left out."""
    numbers = {"reward/failed_groups": float((~rewards.valid_P).sum())}
    if rewards.valid_P.any():
        rewards_PG = rewards.rewards_PG[rewards.valid_P]
        numbers |= {
            "reward/mean": rewards_PG.mean().item(),
            "reward/std": rewards_PG.std(1).mean().item(),
            "reward/equal_groups": equal_reward_groups(rewards_PG).float().mean().item(),
        }
    for name, column_PG in rewards.columns.items():
        if column_PG.isfinite().any():
            numbers[f"reward/{name}"] = column_PG.nanmean().item()
    return numbers


def cut_metrics(rollout: Rollout) -> dict[str, float]:
    """The mean probability that top-k and top-p left out, of what was drawn from and conditional;
    nothing where neither was set.
    """
    if rollout.cut_mass_NT is None or rollout.cut_conditional_mass_NT is None:
        return {}
    return {
        "rollout/cut_mass": rollout.cut_mass_NT.mean().item(),
        "rollout/cut_conditional_mass": rollout.cut_conditional_mass_NT.mean().item(),
    }


def learning_metrics(learned: UpdateStats, reference: Measured, world: World) -> dict[str, float]:
    """What the update of this rank saw and did; all ranks ask for it at the same time."""
    entropy = learned.measured.entropy_NT.mean().item()
    ref_entropy = reference.entropy_NT.mean().item()
    losses = world.concat({name: value[None] for name, value in learned.losses.items()})
    return {
        **equal_group_metrics(learned.credit),
        **credited_metrics(learned.credit),
        **{name: value.item() for name, value in total_losses(losses).items()},
        "entropy/policy": entropy,
        "entropy/reference": ref_entropy,
        "entropy/gap": entropy - ref_entropy,
        "grad/norm": learned.grad_norm,
    }


def credited_metrics(credit: TokenCredit) -> dict[str, float]:
    """Means over the groups that are learned from; nothing where a rank has none of them."""
    valid_P = credit.valid_P > 0
    if not valid_P.any():
        return {}
    credited = {"kl/weight": credit.kl_weight_PGT, **credit.metrics}
    return {name: values[valid_P].float().mean().item() for name, values in credited.items()}


def equal_group_metrics(credit: TokenCredit) -> dict[str, float]:
    """What the entropy reward makes of groups whose rewards are equal, if there are such groups:
    without it they have no advantage.
    """
    share_P = credit.metrics.get("entropy/advantage_share")
    equal_P = credit.equal_P & (credit.valid_P > 0)
    if share_P is None or not equal_P.any():
        return {}
    return {
        "entropy/equal_groups_share": share_P[equal_P].mean().item(),
        "entropy/equal_groups_advantage": credit.advantages_PG[equal_P].abs().mean().item(),
    }


NOT_MEANS: dict[str, Callable[[list[float]], float]] = {
    "mismatch/logprobs_max": max,
    "mismatch/guided_logprobs_max": max,
    "resample/groups": math.fsum,
}
"""How the numbers of several ranks become one; of every other number it is their mean."""


def over_ranks(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of all ranks, which hold equally many images, as those of one. A rank may lack
    one.
    """
    numbers = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        numbers[name] = NOT_MEANS.get(name, statistics.fmean)(values)
    return numbers


def log_samples(
    run: RunFolder, step: Step, learned: UpdateStats, *, num_groups: int, num_rewards: int
) -> None:
    """Writes a grid with rewards and reasons, and the arrays of its groups that a report draws over
    the images: PG, PGT and the prompts.
    """
    rollout, size = step.rollout, step.rollout.group_size
    titles = [prompt.text for prompt in rollout.prompts[:num_groups]]
    valid_P1 = step.rewards.valid_P[:, None]
    rewards_PG = step.rewards.rewards_PG.where(valid_P1, torch.nan)  # a failure is no 0
    rewards = [None if math.isnan(x) else x for x in rewards_PG[:num_groups].flatten().tolist()]
    reasons = step.rewards.reasons[: len(rewards)]
    images_NHWC = rollout.images_NHWC[: len(rewards)]
    captions = list(reasons)
    if num_rewards > 1:  # the reason of a single one says its score
        scores = ["no score" if reward is None else f"{reward:.2f}" for reward in rewards]
        captions = [f"{score}  {why}" for score, why in zip(scores, reasons, strict=True)]
    shown = {"columns": size, "titles": titles, "captions": captions}
    boxes = image_boxes(images_NHWC, **shown)
    records = [
        {"prompt": titles[i // size], "reward": rewards[i], "reason": reasons[i], "box": box}
        for i, box in enumerate(boxes)
    ]
    run.log_images(step.number, image_grid(images_NHWC, **shown), records)
    if step.fixed:
        _log_fixed(run, step.number, step.fixed)

    metrics = learned.credit.metrics.items()
    tensors = {
        "tokens": rollout.tokens_NT.unflatten(0, (-1, size)),
        "rewards": rewards_PG,
        "entropy": learned.measured.entropy_NT.unflatten(0, (-1, size)),
        "reference_entropy": step.reference.entropy_NT.unflatten(0, (-1, size)),
        "kl_weight": learned.credit.kl_weight_PGT,
        "advantages": learned.credit.advantages_PGT,
        **{name.removesuffix("/mean"): values for name, values in metrics if values.ndim == 3},
    }
    arrays = {name: tensor[:num_groups].cpu().numpy() for name, tensor in tensors.items()}
    run.log_arrays(step.number, arrays | {"prompts": np.array(titles)})


def _log_fixed(run: RunFolder, step: int, drawn: Rollout) -> None:
    """Writes the images of the fixed prompts, one beside the other."""
    columns = len(drawn.prompts)
    boxes = image_boxes(drawn.images_NHWC, columns=columns)
    records = [
        {"prompt": prompt.text, "box": box}
        for prompt, box in zip(drawn.prompts, boxes, strict=True)
    ]
    run.log_images(step, image_grid(drawn.images_NHWC, columns=columns), records, folder="fixed")


class Timer:
    """Seconds, and on a GPU the peak of memory, since the last record, by name."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._started = self._last = time.perf_counter()
        self.timings: dict[str, float] = {}
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def record(self, name: str) -> None:
        """Adds the time since the last call to time/NAME; NAME ends in _s. On a GPU also the peak
        of the memory in tensors, under memory/ and the name with _gib, and of what the allocator
        held, with _reserved_gib.
        """
        if self._on_gpu:
            # Not those of the rewards, which run beside the other phases.
            torch.cuda.current_stream().synchronize()
            phase = name.removesuffix("_s")
            peaks = {"": torch.cuda.max_memory_allocated()}
            peaks["_reserved"] = torch.cuda.max_memory_reserved()
            for kind, peak in peaks.items():
                key = f"memory/{phase}{kind}_gib"
                self.timings[key] = max(peak / 2**30, self.timings.get(key, 0.0))
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.timings[f"time/{name}"] = self.timings.get(f"time/{name}", 0.0) + now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """The timings, time/step_s from the start to the last one, and without a GPU the peak of
        the process so far, memory/process_gib.
        """
        numbers = self.timings | {"time/step_s": self._last - self._started}
        if not self._on_gpu:
            unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            numbers["memory/process_gib"] = peak / 2**30
        return numbers


# Throughput. What a step reads and computes follows from formulas, which count what no
# implementation can leave out: the weights once per decoded token, the live part of the cache, two
# operations per parameter and position, and the matmuls of attention. What is computed twice, to
# save memory say, does not count, nor does what is not trained count less.
#
# T image tokens, P positions of a prompt, S = P + T.


@dataclass(frozen=True)
class DecoderSize:
    """The dimensions of a decoder that decide its work."""

    num_layers: int
    query_width: int
    """Query heads times their dimension."""
    trunk_parameters: int
    """Of the linear layers."""
    head_parameters: int
    weight_bytes: int
    """Read by one decode step, whatever its number of rows."""
    position_bytes: int
    """Keys and values of one position of one row, all layers."""

    @classmethod
    def of(cls, decoder: Decoder) -> DecoderSize:
        """The size of the sampler's copies."""
        cache, heads = decoder.cache_shape, decoder.heads
        linear = ("wqkv", "wo", "w_gate_up", "w_down")
        return cls(
            num_layers=cache.num_layers,
            query_width=heads.num_heads * heads.head_dim,
            trunk_parameters=sum(
                getattr(layer, name).numel() for layer in decoder.layers for name in linear
            ),
            head_parameters=sum(weight.numel() for weight, _ in decoder.head_layers),
            weight_bytes=decoder.step_bytes,
            position_bytes=cache.row_bytes(BLOCK) // BLOCK,
        )


@dataclass(frozen=True)
class RolloutStats:
    """The extent of a rollout on one device, whatever its number of passes."""

    num_rows: int
    """Of the decode: images, with guidance twice."""
    num_tokens: int
    """T"""
    prompt_length: float
    """P, the mean over the rows."""
    num_passes: int = 1

    @classmethod
    def of(cls, passes: Sequence[PassStats]) -> RolloutStats:
        """All passes of a rollout; their groups are equal, so each prompt has as many rows."""
        rows = [one.num_rows for one in passes]
        positions = [one.num_rows * one.lengths_B.float().mean().item() for one in passes]
        return cls(sum(rows), passes[0].num_tokens, sum(positions) / sum(rows), len(passes))


def rates(
    size: DecoderSize,
    stats: RolloutStats,
    times: Mapping[str, float],
    *,
    num_images: int,
    scoring: Scoring,
    num_updates: int,
    peak_tflop_per_s: float | None = None,
) -> dict[str, float]:
    """What one device reached in each phase, GB/s and TFLOP/s (powers of 10); of the training
    passes also the share of a peak, where one is given.

    A backward pass counts as two forward passes.
    """
    row = row_flops(size, stats)
    forward = num_images * row * (2 if scoring.has_two_passes else 1)
    backward = 2 * num_images * row * (2 if scoring.has_two_gradients else 1)
    flops = {
        "sample": stats.num_rows * row,
        "reference": forward,
        "learn": num_updates * (forward + backward),
    }
    numbers = {
        f"throughput/{phase}_tflop_per_s": count / times[f"time/{phase}_s"] / 1e12
        for phase, count in flops.items()
    }
    if peak_tflop_per_s:
        for phase in ("reference", "learn"):
            reached = numbers[f"throughput/{phase}_tflop_per_s"]
            numbers[f"throughput/{phase}_mfu"] = reached / peak_tflop_per_s
    read = rollout_bytes(size, stats)
    return numbers | {"throughput/sample_gb_per_s": read / times["time/sample_s"] / 1e9}


PEAK_BF16_TFLOP_PER_S = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
"""Dense matmuls in bf16 by what a device's name holds, as the makers' data sheets say; the first
match counts."""


def peak_bf16(device: torch.device) -> float | None:
    """The peak of a device in TFLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_TFLOP_PER_S.items() if part in name), None)


@contextmanager
def traced(file: Path | None) -> Iterator[None]:
    """Writes what torch's profiler sees inside the block as a trace that Perfetto opens, with a
    GPU its kernels too; None: nothing is written.
    """
    if file is None:
        yield
        return
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    # torch 2.11 warns where events are not said to be kept.
    with profile(activities=kinds, acc_events=True) as found:
        yield
    replace_file(file, lambda path: found.export_chrome_trace(str(path)))


def rollout_bytes(size: DecoderSize, stats: RolloutStats) -> float:
    """Bytes that the decode steps read: in each pass T times the weights, and by each row its live
    positions, T P + T (T + 1) / 2 of them.
    """
    tokens = stats.num_tokens
    live_positions = tokens * stats.prompt_length + tokens * (tokens + 1) / 2
    weights = stats.num_passes * tokens * size.weight_bytes
    return weights + stats.num_rows * size.position_bytes * live_positions


def row_flops(size: DecoderSize, stats: RolloutStats) -> float:
    """Operations of a forward pass of one row: 2 x (trunk x S + image head x T) and in attention
    4 x layers x width x S (S + 1) / 2, what lies behind a position left out.
    """
    positions = stats.prompt_length + stats.num_tokens
    matmuls = 2 * (size.trunk_parameters * positions + size.head_parameters * stats.num_tokens)
    return matmuls + 2 * size.num_layers * size.query_width * positions * (positions + 1)


# Mismatch. The sampler computes with its own copies and kernels, so the policy that drew the images
# is not to the last bit the one that trains. Both are compared under one kind of distribution at a
# time, the conditional or the guided.


def trained_mismatch(
    measured: Measured, rollout: Rollout, settings: AlgorithmConfig
) -> dict[str, float]:
    """The mismatch of all images under the trained distribution, whose log-probabilities the step
    has anyway.
    """
    conditional = settings.logprobs == "conditional"
    sampler_NT = rollout.logprobs_NT if conditional else rollout.guided_logprobs_NT
    if sampler_NT is None:
        return {}
    return mismatch_metrics(measured.logprobs_NT, sampler_NT, settings.logprobs)


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
    one = (sampling.guidance_scale, sampling.temperature) == (1, 1)
    if one or sampling.top_k or sampling.top_p < 1 or not num_images:
        return {}
    trained = precision.scoring.logprobs
    other = sampling.scoring("guided_detached") if trained == "conditional" else CONDITIONAL
    sampler_NT = batch.sampler_logprobs_of(other.logprobs)
    if sampler_NT is None:
        return {}
    size = min(num_images, batch.group_size)
    few = MicroBatch(slice(0, 1), batch.prompts[:1], size, batch.tokens_NT[:size])
    measured = measure(policy, few, replace(precision, scoring=other))
    return mismatch_metrics(measured.logprobs_NT, sampler_NT[:size], other.logprobs)


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
