"""Whether a base policy leaves the method something to work on: entropy, look-alikes, headroom.

Shape suffixes: P prompts, G group, N = P x G images, T image tokens, C codebook channels,
H x W pixels, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups, group_advantages, opposing_similarity
from stage_rl.evaluation.diversity import object_cells
from stage_rl.policies.base import Policy
from stage_rl.rewards.geneval import GenEvalReward, judge
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.shapes.config import ShapesPromptsConfig
from stage_rl.shapes.detector import ShapesDetector
from stage_rl.shapes.gold import inspect
from stage_rl.types import Rollout

GROUP_SIZE = 8
PROMPTS_PER_PASS = 8
STEP = 1
"""Keys the streams, apart from those of benchmarks (step 0)."""


@dataclass(frozen=True)
class RegimeFigures:
    """Means over all groups, None where there is nothing to average.

    Entropies are those of the conditional distribution, divided by ln V.
    """

    entropy: float
    entropy_background: float | None
    entropy_objects: float | None
    similarity: float | None
    """To samples of the opposite sign, in groups whose rewards differ."""
    equal_reward_groups: float
    pass_at_1: float
    """Share of images that the reward's detector calls correct."""
    pass_at_8: float
    """Share of groups with at least one such image."""
    agreement: float
    """Share of images on which the detector's and the strict gold verdict agree."""

    @property
    def headroom(self) -> float:
        """pass@8 - pass@1."""
        return self.pass_at_8 - self.pass_at_1


@dataclass(frozen=True)
class _Seen:
    """What one pass shows."""

    entropy_NT: Tensor
    object_NT: Tensor
    similarity_PGT: Tensor
    equal_P: Tensor
    correct_PG: Tensor
    strict_PG: Tensor


def measure_regime(
    policy: Policy,
    num_images: int,
    *,
    sampling: Sampling,
    seed: int,
    dtype: str = "mixed",
    advance: Callable[[int], None] = lambda _: None,
) -> RegimeFigures:
    """Draws groups of eight for prompts of the training mix and judges them as training does."""
    num_prompts = -(-num_images // GROUP_SIZE)
    prompts = ShapesPromptsConfig(num_prompts=num_prompts, seed=seed).build()
    reward = GenEvalReward(ShapesDetector.load(policy.device))
    engine = Engine(policy, dtype=dtype)
    passes: list[_Seen] = []
    for first in range(0, num_prompts, PROMPTS_PER_PASS):
        part = prompts[first : first + PROMPTS_PER_PASS]
        drawn = rollout(
            engine, part, group_size=GROUP_SIZE, sampling=sampling, seed=seed, step=STEP
        )
        passes.append(_see(policy, drawn, reward))
        advance(len(drawn.tokens_NT))
    return _figures(passes, policy.codebook.size)


def _see(policy: Policy, drawn: Rollout, reward: GenEvalReward) -> _Seen:
    prompts = [prompt for prompt in drawn.prompts for _ in range(drawn.group_size)]
    scores = reward(drawn.images_NHWC, prompts)
    rewards_PG = _by_group([score.value or 0.0 for score in scores])
    codes_NTC = policy.codebook.vectors(drawn.tokens_NT).cpu()
    codes_PGTC = codes_NTC.unflatten(0, (-1, GROUP_SIZE))
    inspections = inspect(drawn.images_NHWC.numpy())
    foreground_NHW = np.stack([one.foreground_HW for one in inspections])
    assert drawn.entropy_NT is not None
    return _Seen(
        entropy_NT=drawn.entropy_NT.cpu(),
        object_NT=object_cells(foreground_NHW, policy.layout(drawn.prompts).grid),
        similarity_PGT=opposing_similarity(codes_PGTC, group_advantages(rewards_PG)),
        equal_P=equal_reward_groups(rewards_PG),
        correct_PG=_by_group([score.extras["correct"] for score in scores]),
        strict_PG=_by_group(
            [
                float(judge(one.detections, prompt.metadata).strict)
                for one, prompt in zip(inspections, prompts, strict=True)
            ]
        ),
    )


def _figures(passes: Sequence[_Seen], codebook_size: int) -> RegimeFigures:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in passes])

    entropy_NT, object_NT = joined("entropy_NT") / math.log(codebook_size), joined("object_NT")
    equal_P, correct_PG, strict_PG = joined("equal_P"), joined("correct_PG"), joined("strict_PG")
    return RegimeFigures(
        entropy=float(entropy_NT.mean()),
        entropy_background=_mean(entropy_NT[~object_NT]),
        entropy_objects=_mean(entropy_NT[object_NT]),
        similarity=_mean(joined("similarity_PGT")[~equal_P]),
        equal_reward_groups=float(equal_P.float().mean()),
        pass_at_1=float(correct_PG.mean()),
        pass_at_8=float(correct_PG.amax(1).mean()),
        agreement=float((correct_PG == strict_PG).float().mean()),
    )


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if values.numel() else None


def _by_group(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).view(-1, GROUP_SIZE)
