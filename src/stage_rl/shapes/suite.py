"""The benchmark `shapes-geneval`: held-out prompts of the shapes world, judged by two judges.

The reward's detector gives the official GenEval verdict, the gold judge the strict one. Structure
and diversity are scores that no reward sees; retention and transfer are prompts that none has seen.
Both are judged by the gold judge; of what a retention prompt names, size and tone count as well as
class and colour, the texture of the background does not.

Shape suffixes: N images, T image tokens, C codebook channels, G images of a prompt, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stage_rl.errors import InputError
from stage_rl.evaluation.results import group_diversity, object_cells
from stage_rl.evaluation.suites import PromptSet, Scorer, Scores, Suite
from stage_rl.policies.base import Policy
from stage_rl.prompts.files import as_prompts
from stage_rl.rewards.base import Reward, RewardConfig, Score
from stage_rl.rewards.geneval import judge
from stage_rl.shapes import gold
from stage_rl.shapes.prompts import evaluation_records, held_out_sets
from stage_rl.shapes.scenes import IMAGE_SIZE
from stage_rl.types import Prompt, Rollout

INDEX_STRIDE = 10_000
"""Index of the first prompt of the second set, and so on: sets share no random stream."""


def benchmark_prompts() -> tuple[Prompt, ...]:
    """The prompts by GenEval task, then the held-out sets; the index keys the random streams."""
    geneval = as_prompts(evaluation_records())
    held_out = [
        Prompt(record["prompt"], number * INDEX_STRIDE + place, {**record, "set": name})
        for number, (name, records) in enumerate(held_out_sets().items(), 1)
        for place, record in enumerate(records)
    ]
    return (*geneval, *held_out)


def _task_of(prompt: Prompt) -> str:
    """The GenEval task, or the name of the held-out set."""
    return prompt.metadata.get("set", prompt.metadata["tag"])


class GoldJudgeConfig(RewardConfig):
    """The gold judge, for evaluation only."""

    def build(self, device: torch.device) -> Reward:
        """The judge, which has no weights."""
        return judge_strictly


def judge_strictly(images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
    """The gold judge's verdicts; the extra `structure` tells whole shapes from blobs."""
    scores = []
    images = images_NHWC.numpy()
    for image_HWC, seen, prompt in zip(images, gold.inspect(images), prompts, strict=True):
        record = prompt.metadata
        verdict = judge(seen.detections, record)
        right = verdict.strict
        if "set" in record:
            right = right and gold.looks_right(seen, image_HWC, record)
        extras = {"structure": gold.structure(seen, record)}
        scores.append(Score(float(right), verdict.why, extras))
    return scores


def _measures(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """By the name of its set for a held-out prompt, else by judge."""
    measures: dict[str, float] = {}
    if "gold" in scores:
        strict = float(scores["gold"].value or 0)
        if "set" in prompt.metadata:
            return {_task_of(prompt): strict}
        measures |= {"gold": strict, **scores["gold"].extras}
    if "detector" in scores:
        measures["detector"] = scores["detector"].extras["correct"]
    if measures.keys() >= {"gold", "detector"}:
        measures["agreement"] = float(measures["gold"] == measures["detector"])
    others = {name: one.value for name, one in scores.items() if name not in ("gold", "detector")}
    return measures | {name: value for name, value in others.items() if value is not None}


def _diversity(policy: Policy, drawn: Rollout) -> list[Mapping[str, float]]:
    """How much the images of each prompt differ; none of held-out sets.

    A policy whose images are not those of the shapes world is an `InputError`.
    """
    height, width = drawn.images_NHWC.shape[1:3]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
        raise InputError(
            f"the model draws images of {height} x {width}; shapes-geneval judges "
            f"{IMAGE_SIZE} x {IMAGE_SIZE}: name a model of the shapes world"
        )
    grid = policy.layout.grid
    codes_NTC = policy.codes(drawn.tokens_NT).cpu()
    inspections = gold.inspect(drawn.images_NHWC.numpy())
    object_NT = object_cells(np.stack([one.foreground_HW for one in inspections]), grid)
    groups = zip(
        drawn.prompts,
        codes_NTC.split(drawn.group_size),
        object_NT.split(drawn.group_size),
        strict=True,
    )
    return [
        {}
        if "set" in prompt.metadata
        else {
            f"diversity_{name}": value
            for name, value in group_diversity(codes_GTC, object_GT).items()
        }
        for prompt, codes_GTC, object_GT in groups
    ]


GUIDANCE_SCALE = 2.5
"""At which the benchmark is drawn where nobody says."""

SHAPES_GENEVAL = Suite(
    name="shapes-geneval",
    prompt_set=PromptSet("shapes_geneval", benchmark_prompts, has_smoke_prompts=False),
    scorers={
        "gold": Scorer({"kind": f"{__name__}:GoldJudgeConfig"}),
        "detector": Scorer(
            {"kind": "geneval", "detector": {"kind": "shapes"}},
            asks=lambda prompt: prompt.metadata.get("set") is None,
        ),
    },
    task_of=_task_of,
    by_task=("gold", "detector"),
    overall=(
        *("structure", "diversity_background", "diversity_objects"),
        *("retention", "transfer", "agreement"),
    ),
    images_per_task=400,
    guidance_scale=GUIDANCE_SCALE,
    measures_of=_measures,
    measures_of_groups=_diversity,
)
