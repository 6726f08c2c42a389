"""`stage shapes show`: the scores of a shapes model, each beside its target.

They say what the tokenizer keeps of an image, how alike its codes are, what the base policy draws,
and whether it leaves the method something to work on: entropy, look-alikes, headroom.

Shape suffixes: P prompts, G group, N = P x G images, T image tokens, C codebook channels,
H x W pixels, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups, group_advantages, opposing_similarity
from stage_rl.api import load
from stage_rl.console import aligned, progress
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.results import (
    OVERALL,
    Results,
    object_cells,
    plain_scores,
    render_table,
)
from stage_rl.evaluation.run import run_suite
from stage_rl.policies.base import Policy
from stage_rl.rewards.geneval import GenEvalReward, judge
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.settings import Seed
from stage_rl.shapes.detector import ShapesDetector
from stage_rl.shapes.gold import inspect, matches_scene
from stage_rl.shapes.pretrain_tokenizer import tokenize
from stage_rl.shapes.prompts import ShapesPromptsConfig
from stage_rl.shapes.scenes import Scene, random_scene, render
from stage_rl.shapes.suite import GUIDANCE_SCALE, SHAPES_GENEVAL
from stage_rl.types import Prompt, Rollout

LOOK_ALIKE = 0.8
"""Cosine from which two codes look alike."""

CHUNK = 100
"""Images that are encoded at one time."""

_KEY = 3_000_000
"""Keys the scenes that the tokenizer is measured on, which no training has seen."""

GROUP_SIZE = 8

PROMPTS_PER_PASS = 8

STEP = 1
"""Keys the streams, apart from those of benchmarks (step 0)."""


class Figure(NamedTuple):
    """A number beside its target."""

    name: str
    value: float | None
    """None: not known, because nothing was there to measure."""
    low: float | None = None
    high: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the number lies outside its target."""
        low, high = self.low or -math.inf, self.high or math.inf
        return self.value is not None and not low <= self.value <= high

    def line(self) -> str:
        """Name, number, target, and `missed` where it is."""
        target = ""
        if self.low is not None:
            target = f"target {self.low} to {self.high}" if self.high else f"target >= {self.low}"
        elif self.high is not None:
            target = f"target <= {self.high}"
        verdict = "  missed" if self.missed else ""
        number = "not known" if self.value is None else f"{self.value:.3f}"
        return f"{self.name:<50}{number:>9}  {target}{verdict}".rstrip()


def main(
    *,
    model: str = "shapes",
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0),
    guidance_scale: float = GUIDANCE_SCALE,
    training_guidance: float = 1.0,
    images_per_task: PositiveInt = 100,
    regime_images: PositiveInt = 2048,
    renders: PositiveInt = 1000,
    seed: Seed = 0,
    dtype: Literal["float32", "mixed"] = "mixed",
) -> dict[str, Any]:
    """Print the scores of a shapes model, each beside its target; `missed` marks the others.

    --model: `shapes` (the shipped one), a folder or a run. --guidance-scales: at which GenEval is
    measured. --guidance-scale: the one that the policy's targets are about. --training-guidance: of
    the regime. --images-per-task, --regime-images, --renders: how many images each part is measured
    on.
    """
    sampling = Sampling(guidance_scale=training_guidance)
    policy = load(model)
    tokenizer = measure_tokenizer(policy, renders, seed=seed)
    _section(f"tokenizer, {renders} renders", tokenizer)
    results = {
        scale: run_suite(
            policy,
            SHAPES_GENEVAL.name,
            Request(images_per_task=images_per_task, guidance_scale=scale, seed=seed, dtype=dtype),
        )
        for scale in sorted({*guidance_scales, guidance_scale})
    }
    print(geneval_tables(results))
    gold = results[guidance_scale].summary("gold")
    hard = ("counting", "position", "color_attr")
    geneval = [
        Figure("overall", gold[OVERALL].mean, 0.45, 0.8),
        *(Figure(task, gold[task].mean, 0.25) for task in hard),
    ]
    _section(f"base policy at guidance {guidance_scale:g}, gold judge", geneval)
    regime = measure_regime(policy, regime_images, sampling=sampling, seed=seed, dtype=dtype)
    _section(f"regime at guidance {training_guidance:g}, {regime_images} images", regime)
    scores = {
        f"{scale:g}": {name: plain_scores(one.summary(name)) for name in one.scores}
        for scale, one in results.items()
    }
    return {
        "model": model,
        "tokenizer": {figure.name: figure.value for figure in tokenizer},
        "geneval": scores,
        "regime": {figure.name: figure.value for figure in regime},
        "missed": [one.name for one in (*tokenizer, *geneval, *regime) if one.missed],
    }


def _section(title: str, figures: Sequence[Figure]) -> None:
    print("\n".join([title, *(f"  {figure.line()}" for figure in figures), ""]), flush=True)


def geneval_tables(results: dict[float, Results]) -> str:
    """Each judge's scores by task, then all other measures, a column per guidance scale."""
    columns = {f"guidance {scale:g}": one for scale, one in results.items()}
    some = next(iter(results.values()))
    blocks = [
        f"GenEval by the {'gold judge' if judge == 'gold' else 'reward detector'}\n"
        + render_table({name: one.summary(judge) for name, one in columns.items()})
        for judge in some.by_task
    ]
    others = [["measure", *columns]]
    for name in (name for name in some.scores if name not in some.by_task):
        cells = (
            f"{one.summary(name)[OVERALL].mean:.3f}" if name in one.scores else "-"
            for one in results.values()
        )
        others.append([name, *cells])
    return "\n\n".join([*blocks, "\n".join(aligned(others))]) + "\n"


def measure_tokenizer(policy: Policy, num_renders: int, *, seed: int) -> list[Figure]:
    """Encodes and decodes scenes that no training has seen; shares in [0, 1]."""
    rng = np.random.Generator(np.random.Philox(key=[seed, _KEY]))
    scenes = [random_scene(rng) for _ in range(num_renders)]
    images_NHWC = render(scenes)
    module: Any = policy.module
    parts = [images_NHWC[i : i + CHUNK] for i in range(0, num_renders, CHUNK)]
    tokens_NT = torch.cat([tokenize(module.model.vqmodel, part) for part in parts])
    rebuilt_NHWC = policy.images([Prompt("a scene")] * num_renders, tokens_NT).numpy()
    codes_VC = policy.codes(torch.arange(policy.codebook_size, device=policy.device)).cpu()
    unit_VC = torch.nn.functional.normalize(codes_VC, dim=1)
    alike_VV = (unit_VC @ unit_VC.T >= LOOK_ALIKE).fill_diagonal_(False)
    used = tokens_NT.unique().cpu()
    size = policy.codebook_size
    return [
        Figure("gold judge right on renders", _share_right(images_NHWC, scenes), 0.99),
        Figure(
            "renders that stay right after encode and decode",
            _share_right(rebuilt_NHWC, scenes),
            0.97,
        ),
        Figure("codes in use", len(used) / size),
        Figure(
            "pairs of different codes with cosine >= 0.8",
            float(alike_VV.sum()) / (size * (size - 1)),
        ),
        Figure("used codes with such a look-alike", float(alike_VV[used].any(1).float().mean())),
    ]


def _share_right(images_NHWC: NDArray[np.uint8], scenes: Sequence[Scene]) -> float:
    """The share of images that hold exactly the objects of their scenes."""
    pairs = zip(inspect(images_NHWC), scenes, strict=True)
    return float(np.mean([matches_scene(one.detections, scene.objects) for one, scene in pairs]))


class RegimeSamples(NamedTuple):
    """What the figures of a regime are means of."""

    entropy_NT: Tensor
    object_NT: Tensor
    similarity_PGT: Tensor
    """To samples of the opposite sign."""
    equal_P: Tensor
    correct_PG: Tensor
    """By the reward's detector."""
    strict_PG: Tensor
    """By the gold judge."""


def measure_regime(
    policy: Policy, num_images: int, *, sampling: Sampling, seed: int, dtype: str = "mixed"
) -> list[Figure]:
    """Draws groups of eight for prompts of the training mix and judges them as training does."""
    num_prompts = -(-num_images // GROUP_SIZE)
    prompts = ShapesPromptsConfig(num_prompts=num_prompts, seed=seed).build()
    reward = GenEvalReward(ShapesDetector.load(policy.device))
    engine = Engine(policy, dtype=dtype)
    passes: list[RegimeSamples] = []
    with progress("regime", num_prompts * GROUP_SIZE) as advance:
        for first in range(0, num_prompts, PROMPTS_PER_PASS):
            part = prompts[first : first + PROMPTS_PER_PASS]
            drawn = rollout(
                engine, part, group_size=GROUP_SIZE, sampling=sampling, seed=seed, step=STEP
            )
            passes.append(_judged(policy, drawn, reward))
            advance(len(drawn.tokens_NT))
    seen = RegimeSamples(*(torch.cat(parts) for parts in zip(*passes, strict=True)))
    return regime_figures(seen, policy.codebook_size)


def _judged(policy: Policy, drawn: Rollout, reward: GenEvalReward) -> RegimeSamples:
    prompts = [prompt for prompt in drawn.prompts for _ in range(GROUP_SIZE)]
    scores = reward(drawn.images_NHWC, prompts)
    inspections = inspect(drawn.images_NHWC.numpy())
    pairs = zip(inspections, prompts, strict=True)
    rewards_PG, correct_PG, strict_PG = (
        torch.tensor(values).view(-1, GROUP_SIZE)
        for values in (
            [score.value or 0.0 for score in scores],
            [score.extras["correct"] for score in scores],
            [float(judge(one.detections, prompt.metadata).strict) for one, prompt in pairs],
        )
    )
    codes_PGTC = policy.codes(drawn.tokens_NT).cpu().unflatten(0, (-1, GROUP_SIZE))
    foreground_NHW = np.stack([one.foreground_HW for one in inspections])
    assert drawn.entropy_NT is not None
    return RegimeSamples(
        entropy_NT=drawn.entropy_NT.cpu(),
        object_NT=object_cells(foreground_NHW, policy.layout.grid),
        similarity_PGT=opposing_similarity(codes_PGTC, group_advantages(rewards_PG)),
        equal_P=equal_reward_groups(rewards_PG),
        correct_PG=correct_PG,
        strict_PG=strict_PG,
    )


def regime_figures(seen: RegimeSamples, codebook_size: int) -> list[Figure]:
    """The means of what was seen; entropies are conditional, divided by ln V."""

    def mean(values: Tensor) -> float | None:
        return float(values.float().mean()) if values.numel() else None

    entropy_NT = seen.entropy_NT / math.log(codebook_size)
    pass_at_1, pass_at_8 = (
        float(share.mean()) for share in (seen.correct_PG, seen.correct_PG.amax(1))
    )
    # Similarity is of groups whose rewards differ: the others have no opposite signs.
    similarity = mean(seen.similarity_PGT[~seen.equal_P])
    agreement = mean(seen.correct_PG == seen.strict_PG)
    return [
        Figure("entropy / ln V", mean(entropy_NT), 0.35, 0.65),
        Figure("entropy / ln V, background tokens", mean(entropy_NT[~seen.object_NT]), 0.2),
        Figure("entropy / ln V, object tokens", mean(entropy_NT[seen.object_NT])),
        Figure("mean similarity to opposite-sign samples", similarity, 0.3, 0.6),
        Figure("groups of 8 with equal rewards", mean(seen.equal_P), 0.2, 0.45),
        Figure("pass@1 by the reward detector", pass_at_1),
        Figure("pass@8 - pass@1", pass_at_8 - pass_at_1, 0.25),
        Figure("agreement of detector and gold judge", agreement, 0.85, 0.93),
    ]
