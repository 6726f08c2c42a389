"""`stage bench step`: a training step of the trainer against one built on transformers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from stage_rl.bench.base import BenchResult, Setting, at_least, check_guided
from stage_rl.bench.eager import EagerStep
from stage_rl.config import load_recipe
from stage_rl.prompts import prompts_of_step
from stage_rl.schema import Recipe
from stage_rl.training.loop import train_step
from stage_rl.training.setup import build_trainer
from stage_rl.types import Prompt

Step = Callable[[int], Mapping[str, float]]
"""Runs the step of a number; seconds by the trainer's names."""

BAR = ">= 2x the eager step (CPU, mixed, 64 images of 144 tokens)"
LEAST_SPEEDUP = 2.0
SIZES = (64, 144)
"""Images of a step and tokens of an image that the bar is set for."""
RECIPE = "shapes_geneval"
PHASES = {
    "sample": "time/sample_s",
    "judge": "time/judge_wait_s",
    "reference": "time/reference_s",
    "learn": "time/learn_s",
    "step": "time/step_s",
}
"""Rows of the table and the trainer's names of their durations."""
NOTE = "judge: the trainer judges while the reference measures; the row is the wait that is left"


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    rounds: int = 3,
    seed: int = 0,
) -> BenchResult:
    """Trains two copies of a model in turn: by the trainer, and by a step on transformers alone.

    Both take the recipe shapes_geneval with these settings, the same prompts and the same reward.
    `model` is a folder, a hub id or `shapes`; `dtype` is `mixed` (bf16 linear layers in sampler and
    trunk, on any processor: one without bf16 arithmetic is slow at it) or `float32`.
    """
    at_least(1, num_prompts=num_prompts, rounds=rounds)
    at_least(2, group_size=group_size)
    at_least(0, seed=seed)
    check_guided(guidance_scale)
    settings = {
        "model": model,
        "num_prompts": num_prompts,
        "group_size": group_size,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "rounds": rounds,
        "seed": seed,
    }
    recipe = load_recipe(
        RECIPE,
        [
            f"policy.path={model}",
            f"rollout.prompts_per_step={num_prompts}",
            f"rollout.group_size={group_size}",
            f"rollout.guidance_scale={guidance_scale}",
            f"rollout.dtype={dtype}",
            f"training.dtype={dtype}",
            f"seed={seed}",
            # Rounds are alike: no picture, no probe, one learning rate.
            "run.log_images_every=0",
            "probe.every=0",
            "optimizer.schedule=constant",
        ],
    )
    return compare(recipe, rounds=rounds, settings=settings)


def compare(recipe: Recipe, *, rounds: int, settings: Mapping[str, Setting]) -> BenchResult:
    """The benchmark for a recipe with a Janus policy and the objective's default preset."""
    prompts = recipe.prompts.build()
    trainer = build_trainer(recipe, prompts)
    eager = EagerStep(recipe, trainer.judge, trainer.policy.device)
    forms: dict[str, Step] = {
        "trainer": lambda step: train_step(trainer, step).clock.times(),
        "eager": lambda step: eager.step(_prompts_of(recipe, prompts, step)),
    }
    measures = _measures(_medians(forms, rounds))
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    num_tokens = trainer.policy.layout(prompts).num_tokens
    on_cpu, mixed = trainer.policy.device.type == "cpu", recipe.training.dtype == "mixed"
    judged = on_cpu and mixed and (num_images, num_tokens) == SIZES
    return BenchResult(
        name="step",
        headline=f"{measures['speedup_step']:.1f}x the eager step, "
        f"{measures['trainer_step_ms']:.0f} against {measures['eager_step_ms']:.0f} ms",
        bar=BAR,
        reached=measures["speedup_step"] >= LEAST_SPEEDUP if judged else None,
        settings=settings,
        measures=measures,
        table=_table(measures),
    )


def _prompts_of(recipe: Recipe, prompts: Sequence[Prompt], step: int) -> tuple[Prompt, ...]:
    """The prompts that the trainer takes."""
    count = recipe.rollout.prompts_per_step
    return prompts_of_step(prompts, step=step, prompts_per_step=count, seed=recipe.seed)


def _medians(forms: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each form's phases over `rounds` in turn, after one round to warm up."""
    laps: dict[str, list[Mapping[str, float]]] = {name: [] for name in forms}
    for step in range(rounds + 1):
        for name, form in forms.items():
            laps[name].append(form(step))
    return {
        name: {
            phase: statistics.median(lap[key] for lap in timed[1:]) for phase, key in PHASES.items()
        }
        for name, timed in laps.items()
    }


def _measures(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    measures = {
        f"{name}_{phase}_ms": value * 1e3
        for name, phases in seconds.items()
        for phase, value in phases.items()
    }
    for phase in PHASES:
        measures[f"speedup_{phase}"] = seconds["eager"][phase] / seconds["trainer"][phase]
    return measures


def _table(measures: Mapping[str, float]) -> tuple[str, ...]:
    rows = [
        f"{phase:<10}{measures[f'trainer_{phase}_ms']:>12.1f}{measures[f'eager_{phase}_ms']:>10.1f}"
        f"{measures[f'speedup_{phase}']:>7.1f}x"
        for phase in PHASES
    ]
    return (f"{'phase':<10}{'trainer ms':>12}{'eager ms':>10}{'ratio':>8}", *rows, NOTE)
