"""`stage bench step`: a training step of the trainer against one built on transformers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from stage_rl.bench.base import BenchResult, Setting, at_least, check_guided
from stage_rl.bench.eager import EagerStep
from stage_rl.bench.limits import PASSES_OF_A_STEP, Work, copy_bytes_per_s, matmul_flops_per_s
from stage_rl.bench.models import RANDOM_JANUS, RANDOM_REWARD, SIZES
from stage_rl.config import load_recipe
from stage_rl.prompts import prompts_of_step
from stage_rl.schema import Recipe
from stage_rl.training.loop import train_step
from stage_rl.training.setup import build_trainer
from stage_rl.training.trainer import Trainer
from stage_rl.types import Prompt

Step = Callable[[int], Mapping[str, float]]
"""Runs the step of a number; seconds by the trainer's names."""

BAR = (
    ">= 2x the eager step (CPU, mixed, 64 images of 144 tokens); one H200: janus-7b, 64 images "
    "<= 10.5 s"
)
LEAST_SPEEDUP = 2.0
MOST_SECONDS_7B = 10.5
IMAGES = 64
TOKENS = 144
"""Images of a step and tokens of an image that the bar of a CPU is set for."""
RECIPE = "shapes_geneval"
PHASES = {
    "sample": "time/sample_s",
    "judge": "time/judge_wait_s",
    "reference": "time/reference_s",
    "learn": "time/learn_s",
    "step": "time/step_s",
}
"""Rows of the table and the trainer's names of their durations."""
NOTE = "judge: the trainer judges while it measures; the row is the wait that is left"
IDEAL = "ideal: the bytes of the rollout as a copy moves them, the passes as one product computes"


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    rounds: int = 3,
    seed: int = 0,
    overrides: str = "",
) -> BenchResult:
    """Trains two copies of a model in turn: by the trainer, and by a step on transformers alone.

    Both take the recipe shapes_geneval with these settings, the same prompts and the same reward.
    `model` is a folder, a hub id, `shapes`, or `janus-1b` and `janus-7b` with random weights: then
    the trainer runs alone, with a reward that takes no time. `dtype` is `mixed` (bf16 linear layers
    in sampler and trunk, on any processor: one without bf16 arithmetic is slow at it) or `float32`.
    `overrides` are further settings, key=value, with spaces between.
    """
    settings: dict[str, Setting] = dict(locals())
    at_least(1, num_prompts=num_prompts, rounds=rounds)
    at_least(2, group_size=group_size)
    at_least(0, seed=seed)
    check_guided(guidance_scale)
    recipe = recipe_of(
        model,
        [
            f"rollout.prompts_per_step={num_prompts}",
            f"rollout.group_size={group_size}",
            f"rollout.guidance_scale={guidance_scale}",
            f"rollout.dtype={dtype}",
            f"training.dtype={dtype}",
            f"seed={seed}",
            *overrides.split(),
        ],
    )
    if model in SIZES:
        return alone(recipe, rounds=rounds, settings=settings)
    return compare(recipe, rounds=rounds, settings=settings)


def recipe_of(model: str, overrides: Sequence[str], *, random: bool | None = None) -> Recipe:
    """The recipe of a benchmark, whose steps are alike: no picture, no probe, one learning rate.

    `random`: weights of a size are drawn and the reward takes no time (None: for a published size).
    """
    parts = [f"policy.path={model}"]
    if model in SIZES if random is None else random:
        parts += [f"policy.kind={RANDOM_JANUS}", f"rewards=[{{kind: '{RANDOM_REWARD}'}}]"]
        parts += ["training.groups_per_microbatch=null", "training.logprob_rows=2048"]
    shown = ["run.log_images_every=0", "probe.every=0", "probe.mismatch_images=0"]
    return load_recipe(RECIPE, [*parts, *shown, "optimizer.schedule=constant", *overrides])


def compare(recipe: Recipe, *, rounds: int, settings: Mapping[str, Setting]) -> BenchResult:
    """The benchmark for a recipe with a Janus policy and the objective's default preset."""
    prompts = recipe.prompts.build()
    trainer = build_trainer(recipe, prompts)
    eager = EagerStep(recipe, trainer.judge, trainer.policy.device)
    forms: dict[str, Step] = {
        "trainer": trainer_form(trainer),
        "eager": lambda step: eager.step(_prompts_of(recipe, prompts, step)),
    }
    measures = _measures(_medians(forms, rounds)) | ideal_ms(trainer)
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    num_tokens = trainer.policy.layout(prompts).num_tokens
    on_cpu, mixed = trainer.policy.device.type == "cpu", recipe.training.dtype == "mixed"
    judged = on_cpu and mixed and (num_images, num_tokens) == (IMAGES, TOKENS)
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


def alone(recipe: Recipe, *, rounds: int, settings: Mapping[str, Setting]) -> BenchResult:
    """The trainer's step beside its ideal, for models of which a machine holds one at a time."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    measures = _measures(_medians({"trainer": trainer_form(trainer)}, rounds)) | ideal_ms(trainer)
    seconds = measures["trainer_step_ms"] / 1e3
    num_images = recipe.rollout.prompts_per_step * recipe.rollout.group_size
    on_h200 = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
    judged = settings["model"] == "janus-7b" and num_images == IMAGES and on_h200
    return BenchResult(
        name="step",
        headline=f"{seconds:.1f} s, {measures['ideal_step_ms'] / 1e3:.1f} s ideal",
        bar=BAR,
        reached=seconds <= MOST_SECONDS_7B if judged else None,
        settings=settings,
        measures=measures,
        table=_table(measures),
    )


def trainer_form(trainer: Trainer) -> Step:
    """The trainer's step of a number; seconds by phase."""
    return lambda step: train_step(trainer, step).clock.times()


def ideal_ms(trainer: Trainer) -> dict[str, float]:
    """Milliseconds of each phase at the speed of a copy and of one large product, by formula."""
    recipe, policy, decoder = trainer.recipe, trainer.policy, trainer.engine.decoder
    prompts = trainer.prompts_of(0)
    work = Work(
        recipe.rollout.prompts_per_step * recipe.rollout.group_size,
        policy.encode(prompts).embeds_PLD.shape[1],
        policy.layout(prompts).num_tokens,
        recipe.rollout.guidance_scale != 1,
    )
    mixed = recipe.training.dtype == "mixed"
    dtype = torch.bfloat16 if mixed else torch.float32
    sample = work.rollout_bytes(decoder) / copy_bytes_per_s(policy.device)
    one_pass = work.pass_flops(decoder) / matmul_flops_per_s(policy.device, dtype)
    seconds = {
        "sample": sample,
        "judge": 0.0,
        "reference": one_pass,
        "learn": (PASSES_OF_A_STEP - 1) * one_pass,
        "step": sample + PASSES_OF_A_STEP * one_pass,
    }
    return {f"ideal_{phase}_ms": value * 1e3 for phase, value in seconds.items()}


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
    if "eager" in seconds:
        for phase in PHASES:
            measures[f"speedup_{phase}"] = seconds["eager"][phase] / seconds["trainer"][phase]
    return measures


def _table(measures: Mapping[str, float]) -> tuple[str, ...]:
    eager = "eager_step_ms" in measures
    head = f"{'phase':<10}{'trainer ms':>12}" + f"{'eager ms':>10}{'ratio':>8}" * eager
    rows = [f"{head}{'ideal ms':>10}"]
    for phase in PHASES:
        row = f"{phase:<10}{measures[f'trainer_{phase}_ms']:>12.1f}"
        if eager:
            row += f"{measures[f'eager_{phase}_ms']:>10.1f}{measures[f'speedup_{phase}']:>7.1f}x"
        rows.append(f"{row}{measures[f'ideal_{phase}_ms']:>10.1f}")
    return (*rows, NOTE, IDEAL)
