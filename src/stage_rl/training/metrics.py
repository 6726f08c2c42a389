"""The numbers of one step, flat, under the names that console, file and report share.

Shape suffixes: P prompts, G group, N = P x G completions, T image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups
from stage_rl.errors import DivergedError
from stage_rl.health import LivenessConfig
from stage_rl.training.credit import Credit
from stage_rl.training.update import Learned
from stage_rl.types import Judged, Measured, Rollout


def reward_metrics(judged: Judged) -> dict[str, float]:
    """What the rewards said; a column that applies to no image is left out."""
    numbers = {"reward/failed_groups": float((~judged.kept_P).sum())}
    if judged.kept_P.any():
        rewards_PG = judged.rewards_PG[judged.kept_P]
        numbers |= {
            "reward/mean": rewards_PG.mean().item(),
            "reward/std": rewards_PG.std(1).mean().item(),
            "reward/equal_groups": equal_reward_groups(rewards_PG).float().mean().item(),
        }
    for name, column_PG in judged.columns.items():
        if column_PG.isfinite().any():
            numbers[f"reward/{name}"] = column_PG.nanmean().item()
    return numbers


def over_ranks(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The numbers of all ranks, which hold equally many images, as those of one: means, the largest
    of what ends in _max, and the sum of resample/groups. A rank may lack one.
    """
    found = {
        name: [part[name] for part in parts if name in part]
        for name in dict.fromkeys(name for part in parts for name in part)
    }
    return {
        name: max(values)
        if name.endswith("_max")
        else math.fsum(values) / (1 if name == "resample/groups" else len(values))
        for name, values in found.items()
    }


def learning_metrics(learned: Learned, reference: Sequence[Measured]) -> dict[str, float]:
    """What the update saw and did."""
    ref_entropy = torch.cat([measured.entropy_NT for measured in reference]).mean().item()
    entropy = learned.measured.entropy_NT.mean().item()
    losses = learned.losses
    return {
        "entropy/policy": entropy,
        "entropy/reference": ref_entropy,
        "entropy/gap": entropy - ref_entropy,
        "kl/mean": losses.mean_kl.item(),
        "kl/weight": _mean(learned.credits, "kl_weight_PGT"),
        "similarity/mean": _mean(learned.credits, "similarity_PGT"),
        "mask/mean": _mean(learned.credits, "mask_PGT"),
        "loss/total": losses.total.item(),
        "loss/policy": losses.policy.item(),
        "loss/kl": losses.kl.item(),
        "loss/entropy": losses.entropy.item(),
        "clip/fraction": losses.clip_fraction.item(),
        "grad/norm": learned.grad_norm,
    }


def report_arrays(
    rollout: Rollout,
    judged: Judged,
    learned: Learned,
    reference: Sequence[Measured],
    *,
    num_groups: int,
) -> dict[str, np.ndarray]:
    """The first groups' arrays that a report draws over the images: PG, PGT and the prompts."""
    size = rollout.group_size

    def by_group(values_NT: Tensor) -> Tensor:
        return values_NT.view(-1, size, values_NT.shape[-1])

    tensors = {
        "tokens": by_group(rollout.tokens_NT),
        "rewards": judged.rewards_PG,
        "entropy": by_group(learned.measured.entropy_NT),
        "reference_entropy": by_group(torch.cat([m.entropy_NT for m in reference])),
    }
    for name in ("similarity_PGT", "mask_PGT", "kl_weight_PGT", "advantages_PGT"):
        stacked = torch.cat([getattr(part, name) for part in learned.credits])
        tensors[name.removesuffix("_PGT")] = stacked
    arrays = {name: tensor[:num_groups].cpu().numpy() for name, tensor in tensors.items()}
    arrays["prompts"] = np.array([prompt.text for prompt in rollout.prompts[:num_groups]])
    return arrays


class Liveness:
    """Stops a run that looks healthy but no longer learns: counts the signs of it, step by step."""

    def __init__(self, settings: LivenessConfig, counters: Mapping[str, int] | None = None) -> None:
        self._settings = settings
        self.counters: dict[str, int] = dict(counters or {})

    def check(self, judged: Judged, grad_norm: float | None) -> None:
        """Takes a step into account; raises DivergedError when a sign has held for too long.

        `grad_norm` is None for a step that had nothing to learn from.
        """
        rewards_PG = judged.rewards_PG[judged.kept_P]
        equal = len(rewards_PG) > 0 and bool(equal_reward_groups(rewards_PG).all())
        signs = {
            "failed_reward_steps": (
                not judged.kept_P.all(),
                f"a reward failed on some group (at last: {_failure(judged)})",
            ),
            # One number for all images is the narrower sign: it is named first.
            "constant_reward_steps": (
                equal and bool(rewards_PG.max() == rewards_PG.min()),
                "every image had the same reward",
            ),
            "equal_reward_steps": (equal, "all rewards of every group were equal"),
            "zero_gradient_steps": (grad_norm == 0, "the gradient was exactly 0"),
        }
        for name, (seen, words) in signs.items():
            limit = getattr(self._settings, name)
            self.counters[name] = self.counters.get(name, 0) + 1 if seen else 0
            if limit and self.counters[name] >= limit:
                raise DivergedError(
                    f"for {limit} steps in a row {words}; mend the cause, or raise liveness.{name}"
                )


def _failure(judged: Judged) -> str:
    """The reason of a group that left the step; empty where none did."""
    group_size = len(judged.reasons) // len(judged.kept_P)
    lost = (~judged.kept_P).nonzero().flatten().tolist()
    return judged.reasons[lost[0] * group_size] if lost else ""


def _mean(credits: Sequence[Credit], name: str) -> float:
    values = torch.cat([getattr(part, name) for part in credits])
    mean = values.mean().item()
    assert math.isfinite(mean), name
    return mean
