"""`stage bench rewards`: images per second of each reward, batched against one by one.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage_rl.bench.base import BenchResult, at_least, interleaved
from stage_rl.config import load_recipe
from stage_rl.distributed import pick_device
from stage_rl.errors import InputError
from stage_rl.rewards.base import Reward, RewardConfig
from stage_rl.rewards.judge import check_fields
from stage_rl.rewards.ocr import OcrReward, ParallelReader, text_image
from stage_rl.settings import near_or_all
from stage_rl.types import Prompt

BAR = "batches at least as fast as one by one for every model"
LEAST_SPEEDUP = 1.0

REWARDS: Mapping[str, Mapping[str, Any]] = {
    "ocr": {},
    "geneval": {},
    "grounding_dino": {},
    "git": {},
    "hps": {},
    "pickscore": {},
    "image_reward": {},
}
"""What can be timed without a recipe: RapidOCR, and models with their published weights."""
WORDS = ("Open", "Bakery", "Hello World", "Exit")
ONE_BY_ONE_ANYWAY = ("ocr",)
"""Its engine takes one image at a time; processes are what makes it faster."""


def run(
    *,
    recipe: str = "",
    rewards: tuple[str, ...] = ("ocr",),
    num_prompts: int = 4,
    group_size: int = 4,
    image_size: int = 384,
    ocr_processes: int = 2,
    rounds: int = 3,
    device: str = "auto",
) -> BenchResult:
    """Times rewards on images of written words: those of a recipe as they are, else by name.

    The bar is for a recipe's rewards. With `ocr_processes` above 1, OCR is timed in several too.
    """
    at_least(1, num_prompts=num_prompts, group_size=group_size, ocr_processes=ocr_processes)
    at_least(1, rounds=rounds)
    at_least(48, image_size=image_size)
    configs, prompts = _from_recipe(recipe) if recipe else (_tiny(rewards, ocr_processes), PROMPTS)
    check_fields(configs, prompts)
    asked = [prompts[i % len(prompts)] for i in range(num_prompts) for _ in range(group_size)]
    images_NHWC = _images(len(asked), image_size)
    place = pick_device(device)
    measures: dict[str, float] = {}
    for config in configs:
        reward = config.build(place)
        measures |= _measure(config.name, reward, images_NHWC, asked, rounds)
        _close(reward)
    settings = {"recipe": recipe, "num_prompts": num_prompts, "group_size": group_size}
    settings |= {"image_size": image_size, "rounds": rounds, "device": str(place)}
    return _result([config.name for config in configs], measures, settings)


PROMPTS = tuple(
    Prompt(
        f'a red cat beside a sign that says "{word}"',
        index,
        {
            "tag": "single_object",
            "include": [{"class": "cat", "count": 1}],
            "task_type": "color",
            "nouns": ["cat", "sign"],
            "attr_nouns": ["red cat", "sign"],
            "target": word,
        },
    )
    for index, word in enumerate(WORDS)
)
"""Prompts with the metadata that every built-in reward needs."""


def _from_recipe(name: str) -> tuple[Sequence[RewardConfig], Sequence[Prompt]]:
    recipe = load_recipe(name)
    return recipe.rewards, recipe.prompts.build()


def _tiny(names: Sequence[str], ocr_processes: int) -> list[RewardConfig]:
    """The rewards of these names as published; an InputError for an unknown name."""
    configs = []
    for name in names:
        if name not in REWARDS:
            raise InputError(f"--rewards: unknown reward '{name}'; {near_or_all(name, REWARDS)}")
        configs.append(RewardConfig.model_validate({"kind": name, **REWARDS[name]}))
    if "ocr" in names and ocr_processes > 1:
        several = {"kind": "ocr", "name": f"ocr_{ocr_processes}", "processes": ocr_processes}
        configs.append(RewardConfig.model_validate(several))
    return configs


def _images(count: int, side: int) -> Tensor:
    """images_NHWC of words, so that an OCR engine has something to read."""
    pictures = [np.asarray(text_image(WORDS[i % len(WORDS)], size=side)) for i in range(count)]
    return torch.from_numpy(np.stack(pictures))


def _measure(
    name: str, reward: Reward, images_NHWC: Tensor, prompts: list[Prompt], rounds: int
) -> dict[str, float]:
    def single() -> None:
        for i, prompt in enumerate(prompts):
            reward(images_NHWC[i : i + 1], [prompt])

    forms = {"batched": lambda: reward(images_NHWC, prompts), "single": single}
    seconds = interleaved(forms, rounds)
    return {
        f"{name}_batched_per_s": len(prompts) / seconds["batched"],
        f"{name}_single_per_s": len(prompts) / seconds["single"],
        f"{name}_speedup": seconds["single"] / seconds["batched"],
    }


def _close(reward: Reward) -> None:
    """Ends the processes of a reward that has some."""
    if isinstance(reward, OcrReward) and isinstance(reward.reader, ParallelReader):
        reward.reader.close()


def _result(
    names: Sequence[str], measures: Mapping[str, float], settings: Mapping[str, Any]
) -> BenchResult:
    rows = [
        f"{name:<16}{measures[f'{name}_batched_per_s']:>12.1f}"
        f"{measures[f'{name}_single_per_s']:>12.1f}{measures[f'{name}_speedup']:>9.2f}x"
        for name in names
    ]
    judged = [name for name in names if not name.startswith(ONE_BY_ONE_ANYWAY)]
    speedups = [measures[f"{name}_speedup"] for name in judged]
    spread = f"{min(speedups):.1f}x to {max(speedups):.1f}x" if speedups else "no model timed:"
    return BenchResult(
        name="rewards",
        headline=f"{spread} images per second batched against one by one",
        bar=BAR,
        reached=min(speedups) >= LEAST_SPEEDUP if speedups and settings["recipe"] else None,
        settings=settings,
        measures=measures,
        table=(f"{'reward':<16}{'batched/s':>12}{'single/s':>12}{'ratio':>10}", *rows),
    )
