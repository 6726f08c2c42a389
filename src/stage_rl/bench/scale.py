"""`stage bench scale`: what a training step costs for each image, against G and against T."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass

import torch

from stage_rl.bench.base import BenchResult, at_least, check_guided
from stage_rl.bench.models import bench_device
from stage_rl.bench.step import PHASES, recipe_of, trainer_form
from stage_rl.training.trainer import build_trainer

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
    settings = dict(locals())
    at_least(2, group_sizes=group_sizes)
    at_least(1, num_prompts=num_prompts, image_sizes=image_sizes, rounds=rounds)
    check_guided(guidance_scale)
    common = (
        f"rollout.prompts_per_step={num_prompts}",
        f"rollout.guidance_scale={guidance_scale}",
        f"rollout.dtype={dtype}",
        f"training.dtype={dtype}",
        *overrides.split(),
    )
    cases = [Case(f"g{size}", size, None) for size in group_sizes]
    cases += [Case(f"t{pixels}px", group_sizes[0], pixels) for pixels in image_sizes]
    measures: dict[str, float] = {}
    for case in cases:
        found, num_tokens = _step_ms(model, [*common, *case.overrides()], rounds)
        measures[f"tokens_{case.name}"] = num_tokens
        for part in PARTS:
            per_image = found[part] / (num_prompts * case.group_size)
            measures[f"{part}_ms_per_image_{case.name}"] = per_image
    return BenchResult(
        name="scale",
        headline=_headline(measures, group_sizes, image_sizes),
        bar=BAR,
        reached=_reached(measures),
        settings=settings,
        measures=measures,
        table=_table(measures, cases),
    )


@dataclass(frozen=True)
class Case:
    """One measured step."""

    name: str
    group_size: int
    image_size: int | None
    """Pixels of a side; None: those of the size."""

    def overrides(self) -> list[str]:
        """What differs from the other cases, as settings."""
        settings = [f"rollout.group_size={self.group_size}"]
        return [*settings, *([f"policy.image_size={self.image_size}"] if self.image_size else [])]


def _table(measures: dict[str, float], cases: list[Case]) -> tuple[str, ...]:
    lines = [f"{'case':<8}{'G':>4}{'T':>6}" + "".join(f"{part:>12}" for part in PARTS)]
    for case in cases:
        figures = (measures[f"{part}_ms_per_image_{case.name}"] for part in PARTS)
        times = "".join(f"{value:>12.2f}" for value in figures)
        tokens = measures[f"tokens_{case.name}"]
        lines.append(f"{case.name:<8}{case.group_size:>4}{tokens:>6.0f}{times}")
    return (*lines, "milliseconds for each image")


def _step_ms(model: str, settings: list[str], rounds: int) -> tuple[dict[str, float], int]:
    """Median milliseconds of each phase after one step to warm up, and the tokens of an image."""
    recipe = recipe_of(model, settings, random=True)
    trainer = build_trainer(recipe, recipe.prompts.build())
    step = trainer_form(trainer)
    laps = [step(number) for number in range(rounds + 1)][1:]
    num_tokens = trainer.policy.layout.num_tokens
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
