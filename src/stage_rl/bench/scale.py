"""`stage bench scale`: what a training step costs for each image, against G and against T."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from stage_rl.bench.base import BenchResult, benchmark, columns, medians_in_turn
from stage_rl.bench.models import recipe_of
from stage_rl.bench.step import PHASES, trainer_form
from stage_rl.recipe import Recipe
from stage_rl.training.trainer import build_trainer

BAR = "per image at G = 16 <= 0.92 of G = 8 (GPU; on a CPU reported)"
MOST_OF_G8 = 0.92
PARTS = ("sample", "reference", "learn", "step")


@benchmark(BAR, group_sizes=2)
def run(
    *,
    model: str = "shapes",
    num_prompts: int = 2,
    group_sizes: tuple[int, ...] = (4, 8, 16),
    image_sizes: tuple[int, ...] = (32, 48, 64),
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    rounds: int = 3,
    overrides: str = "",
) -> BenchResult:
    """Training steps of random weights of a size, with a reward that takes no time.

    `model` is `shapes`, `janus-1b` or `janus-7b`. First every group size at the size's own images,
    then images of `image_sizes` pixels a side (T grows with the square) at the first group size.
    `overrides` are further settings, key=value, with spaces between.
    """
    cases: dict[str, tuple[int, list[str]]] = {f"g{size}": (size, []) for size in group_sizes}
    cases |= {
        f"t{pixels}px": (group_sizes[0], [f"policy.image_size={pixels}"]) for pixels in image_sizes
    }
    measures: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [("case", "G", "T", *PARTS)]
    for name, (group_size, settings) in cases.items():
        recipe = recipe_of(
            model,
            [*overrides.split(), *settings],
            random=True,
            num_prompts=num_prompts,
            group_size=group_size,
            guidance_scale=guidance_scale,
            dtype=dtype,
        )
        per_image, num_tokens = _ms_per_image(recipe, rounds)
        measures[f"tokens_{name}"] = num_tokens
        measures |= {f"{part}_ms_per_image_{name}": per_image[part] for part in PARTS}
        times = (f"{per_image[part]:.2f}" for part in PARTS)
        rows.append((name, str(group_size), str(num_tokens), *times))
    return BenchResult(
        _headline(measures, group_sizes, image_sizes),
        _reached(measures),
        measures,
        (*columns(*rows), "milliseconds for each image"),
    )


def _ms_per_image(recipe: Recipe, rounds: int) -> tuple[dict[str, float], int]:
    """Median milliseconds of each phase for one image, and the tokens of an image."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    seconds = medians_in_turn({"trainer": trainer_form(trainer)}, rounds)["trainer"]
    num_tokens = trainer.policy.layout.num_tokens
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    return {part: seconds[PHASES[part]] / num_images * 1e3 for part in PARTS}, num_tokens


def _headline(
    measures: dict[str, float], group_sizes: Sequence[int], image_sizes: Sequence[int]
) -> str:
    def ratio(figure: str, one: str, other: str) -> float:
        return measures[f"{figure}_{one}"] / measures[f"{figure}_{other}"]

    first, last = group_sizes[0], group_sizes[-1]
    small, large = f"t{image_sizes[0]}px", f"t{image_sizes[-1]}px"
    return (
        f"an image costs {ratio('step_ms_per_image', f'g{last}', f'g{first}'):.2f} at G = {last} "
        f"of what it does at G = {first}; with {ratio('tokens', large, small):.1f}x the tokens "
        f"{ratio('step_ms_per_image', large, small):.1f}x"
    )


def _reached(measures: dict[str, float]) -> bool | None:
    at_8, at_16 = (measures.get(f"step_ms_per_image_g{size}") for size in (8, 16))
    if not torch.cuda.is_available() or at_8 is None or at_16 is None:
        return None
    return at_16 <= MOST_OF_G8 * at_8
