"""`stage bench scale`: what a training step costs for each image, against G and against T."""

from __future__ import annotations

import torch
from pydantic import PositiveInt

from stage_rl.bench.base import BenchResult, Group, flat, medians_in_turn, table
from stage_rl.bench.models import recipe_of
from stage_rl.bench.step import PHASES, trainer_form
from stage_rl.distributed import release_unused
from stage_rl.recipe import Recipe
from stage_rl.training.trainer import build_trainer

BAR = "per image at G = 16 <= 0.92 of G = 8 (GPU; on a CPU reported)"
MAX_SHARE_OF_G8 = 0.92
PARTS = ("sample", "reference", "learn", "step")


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 2,
    group_sizes: tuple[Group, ...] = (4, 8, 16),
    image_sizes: tuple[PositiveInt, ...] = (32, 48, 64),
    rounds: PositiveInt = 3,
    overrides: str = "",
) -> BenchResult:
    """Training steps of random weights of a size, with a reward that takes no time.

    `model` is `shapes`, `janus-1b` or `janus-7b`. First every group size at the size's own images,
    then images of `image_sizes` pixels a side (T grows with the square) at the first group size.
    `overrides` are further settings, key=value, with spaces between.
    """
    cases = {f"g{size}": (size, "") for size in group_sizes}
    cases |= {f"t{side}px": (group_sizes[0], f"policy.image_size={side}") for side in image_sizes}
    rows: dict[str, dict[str, float]] = {}
    for name, (group_size, setting) in cases.items():
        settings = [*overrides.split(), *setting.split()]
        recipe = recipe_of(
            model, settings, num_prompts=num_prompts, group_size=group_size, random=True
        )
        rows[name] = _per_image(recipe, rounds)
    few, many = rows[f"g{group_sizes[0]}"], rows[f"g{group_sizes[-1]}"]
    small, large = rows[f"t{image_sizes[0]}px"], rows[f"t{image_sizes[-1]}px"]
    formats = {"tokens": ".0f", **{f"{part}_ms": ".2f" for part in PARTS}}
    return BenchResult(
        f"an image costs {many['step_ms'] / few['step_ms']:.2f} at G = {group_sizes[-1]} of what "
        f"it does at G = {group_sizes[0]}; with {large['tokens'] / small['tokens']:.1f}x the "
        f"tokens {large['step_ms'] / small['step_ms']:.1f}x",
        _reached({name: figures["step_ms"] for name, figures in rows.items()}),
        flat(rows),
        (*table(rows, formats), "milliseconds for each image"),
    )


def _per_image(recipe: Recipe, rounds: int) -> dict[str, float]:
    """Median milliseconds of each phase for one image, and the tokens of an image."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    seconds = medians_in_turn({"trainer": trainer_form(trainer)}, rounds)["trainer"]
    num_tokens = trainer.policy.layout.num_tokens
    del trainer
    release_unused()
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    times = {f"{part}_ms": seconds[PHASES[part]] / num_images * 1e3 for part in PARTS}
    return {"tokens": num_tokens, **times}


def _reached(step_ms: dict[str, float]) -> bool | None:
    if not torch.cuda.is_available() or not {"g8", "g16"} <= step_ms.keys():
        return None
    return step_ms["g16"] <= MAX_SHARE_OF_G8 * step_ms["g8"]
