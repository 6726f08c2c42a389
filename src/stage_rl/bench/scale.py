"""`stage bench scale`: what a training step costs for each image, against G and against T."""

from __future__ import annotations

import gc
import statistics

import torch

from stage_rl.bench.base import BenchResult, at_least, check_guided
from stage_rl.bench.models import bench_device
from stage_rl.bench.step import PHASES, recipe_of, trainer_form
from stage_rl.training.setup import build_trainer

BAR = "per image at G = 16 <= 0.92 of G = 8 (GPU; on a CPU reported)"
MOST_OF_G8 = 0.92
PARTS = ("sample", "reference", "learn", "step")


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
    at_least(2, group_sizes=group_sizes)
    at_least(1, num_prompts=num_prompts, image_sizes=image_sizes, rounds=rounds)
    check_guided(guidance_scale)
    common = [
        f"rollout.prompts_per_step={num_prompts}",
        f"rollout.guidance_scale={guidance_scale}",
        f"rollout.dtype={dtype}",
        f"training.dtype={dtype}",
        *overrides.split(),
    ]
    cases = [(f"g{size}", size, None) for size in group_sizes]
    cases += [(f"t{pixels}px", group_sizes[0], pixels) for pixels in image_sizes]
    measures: dict[str, float] = {}
    lines = [f"{'case':<8}{'G':>4}{'T':>6}" + "".join(f"{part:>12}" for part in PARTS)]
    for name, group_size, pixels in cases:
        settings = [*common, f"rollout.group_size={group_size}"]
        if pixels:
            settings.append(f"policy.image_size={pixels}")
        found, num_tokens = _step_ms(model, settings, rounds)
        figures = {part: found[part] / (num_prompts * group_size) for part in PARTS}
        measures |= {f"{part}_ms_per_image_{name}": value for part, value in figures.items()}
        measures[f"tokens_{name}"] = num_tokens
        times = "".join(f"{value:>12.2f}" for value in figures.values())
        lines.append(f"{name:<8}{group_size:>4}{num_tokens:>6}{times}")
    return BenchResult(
        name="scale",
        headline=_headline(measures, group_sizes, image_sizes),
        bar=BAR,
        reached=_reached(measures),
        settings={
            "model": model,
            "num_prompts": num_prompts,
            "group_sizes": group_sizes,
            "image_sizes": image_sizes,
            "guidance_scale": guidance_scale,
            "dtype": dtype,
            "rounds": rounds,
            "overrides": overrides,
        },
        measures=measures,
        table=(*lines, "milliseconds for each image"),
    )


def _step_ms(model: str, settings: list[str], rounds: int) -> tuple[dict[str, float], int]:
    """Median milliseconds of each phase after one step to warm up, and the tokens of an image."""
    recipe = recipe_of(model, settings, random=True)
    trainer = build_trainer(recipe, recipe.prompts.build())
    step = trainer_form(trainer)
    laps = [step(number) for number in range(rounds + 1)][1:]
    num_tokens = trainer.policy.layout(trainer.prompts[:1]).num_tokens
    del trainer, step
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {
        part: statistics.median(lap[PHASES[part]] for lap in laps) * 1e3 for part in PARTS
    }, num_tokens


def _headline(
    measures: dict[str, float], group_sizes: tuple[int, ...], image_sizes: tuple[int, ...]
) -> str:
    def ratio(one: str, other: str) -> float:
        return measures[f"step_ms_per_image_{one}"] / measures[f"step_ms_per_image_{other}"]

    first, last = f"g{group_sizes[0]}", f"g{group_sizes[-1]}"
    small, large = f"t{image_sizes[0]}px", f"t{image_sizes[-1]}px"
    tokens = measures[f"tokens_{large}"] / measures[f"tokens_{small}"]
    return (
        f"an image costs {ratio(last, first):.2f} at G = {group_sizes[-1]} of what it does at G = "
        f"{group_sizes[0]}; with {tokens:.1f}x the tokens {ratio(large, small):.1f}x"
    )


def _reached(measures: dict[str, float]) -> bool | None:
    at_8, at_16 = (measures.get(f"step_ms_per_image_g{size}") for size in (8, 16))
    if bench_device().type != "cuda" or at_8 is None or at_16 is None:
        return None
    return at_16 <= MOST_OF_G8 * at_8
