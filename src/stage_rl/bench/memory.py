"""`stage bench memory`: the memory predicted for each phase of a step against what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from stage_rl.bench.base import BenchResult, at_least, check_guided, peak_bytes
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.policies.janus import JanusConfig
from stage_rl.policies.janus_sizes import size_of
from stage_rl.recipe import Recipe
from stage_rl.training.loop import train_step
from stage_rl.training.memory import Plan, predict
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.training.update import learn, measure_all, measure_to_learn

BAR = "every phase within 15 %"
FARTHEST = 0.15
RECIPE = "shapes_geneval"
PHASES = ("sample", "reference", "learn")
MIB = 2**20


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    groups_per_microbatch: int = 2,
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    checkpointing: str = "none",
    release_cache: bool = False,
    seed: int = 0,
) -> BenchResult:
    """Takes two steps of the recipe shapes_geneval with these settings and looks at the second.

    On a GPU the figures are the allocator's; on a CPU the storages of tensors, those that are there
    between two phases and those that operations return in one. `checkpointing` is `none`,
    `selective` or `full`.
    """
    at_least(1, num_prompts=num_prompts, groups_per_microbatch=groups_per_microbatch)
    at_least(2, group_size=group_size)
    check_guided(guidance_scale)
    settings = {
        "policy.path": model,
        "rollout.prompts_per_step": num_prompts,
        "rollout.group_size": group_size,
        "rollout.guidance_scale": guidance_scale,
        "rollout.dtype": dtype,
        "rollout.release_cache": release_cache,
        "training.dtype": dtype,
        "training.groups_per_microbatch": groups_per_microbatch,
        "training.activation_checkpointing": checkpointing,
        "seed": seed,
        "probe.every": 0,
        "probe.mismatch_images": 0,
        "run.log_images_every": 0,
    }
    recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    return compare(recipe)


def compare(recipe: Recipe) -> BenchResult:
    """The benchmark for a recipe with a Janus policy whose dimensions are known."""
    assert isinstance(recipe.policy, JanusConfig)
    size = size_of(recipe.policy.path)
    if size is None:
        raise InputError(f"{recipe.policy.path}: its dimensions are not known; write a folder")
    before = _tensor_bytes()
    trainer = build_trainer(recipe, recipe.prompts.build())
    on_gpu = trainer.policy.device.type == "cuda"
    slots = max(trainer.policy.encode(trainer.prompts_of(1)).lengths_P.tolist())
    plan = predict(recipe, size, on_gpu=on_gpu, prompt_slots=int(slots))
    # The first step makes what stays: moments, cache, compiled kernels.
    train_step(trainer, 0)
    seen = _on_gpu(trainer) if on_gpu else _on_cpu(trainer, before)
    return _result(recipe, plan, seen)


def _on_gpu(trainer: Trainer) -> dict[str, float]:
    laps = train_step(trainer, 1).timer.timings
    return {phase: laps[f"memory/{phase}_gib"] * 2**30 for phase in PHASES}


def _on_cpu(trainer: Trainer, before: int) -> dict[str, float]:
    """Tensors that lie there when a phase begins, and the most that it adds."""
    seen: dict[str, float] = {}

    def phase(name: str, work: Callable[[], Any]) -> None:
        lying = _tensor_bytes() - before
        seen[name] = lying + peak_bytes(work)

    kept = []
    trainer.engine.reload()
    prompts = trainer.prompts_of(1)
    phase("sample", lambda: kept.append(trainer.sample(trainer.engine, prompts, step=1)))
    rewards = trainer.rewards.score(kept[0])
    batches = trainer.batches(kept[0])
    references = []
    phase(
        "reference",
        lambda: references.extend(measure_all(trainer.reference, batches, trainer.precision)),
    )
    update = trainer.update(rate=1e-6)
    phase(
        "learn",
        lambda: learn(
            trainer.policy,
            trainer.optimizer,
            batches,
            first=measure_to_learn(trainer.policy, batches[0], update),
            rewards=rewards,
            reference=references,
            update=update,
        ),
    )
    return seen


def _tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # Some objects answer isinstance by importing; the type does not.
        if issubclass(type(item), Tensor):
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _result(recipe: Recipe, plan: Plan, seen: Mapping[str, float]) -> BenchResult:
    measures: dict[str, float] = {}
    rows = [f"{'phase':<12}{'predicted MiB':>15}{'seen MiB':>12}{'ratio':>8}"]
    for phase in PHASES:
        predicted = plan.totals[phase]
        ratio = predicted / seen[phase]
        measures[f"{phase}_predicted_mib"] = predicted / MIB
        measures[f"{phase}_seen_mib"] = seen[phase] / MIB
        measures[f"{phase}_ratio"] = ratio
        rows.append(f"{phase:<12}{predicted / MIB:>15.1f}{seen[phase] / MIB:>12.1f}{ratio:>8.2f}")
    worst = max((measures[f"{phase}_ratio"] for phase in PHASES), key=lambda r: abs(r - 1))
    return BenchResult(
        name="memory",
        headline=f"predicted is {worst:.2f}x the seen where they are farthest apart",
        bar=BAR,
        reached=abs(worst - 1) <= FARTHEST,
        settings={
            "prompts_per_step": recipe.rollout.prompts_per_step,
            "group_size": recipe.rollout.group_size,
            "groups_per_microbatch": recipe.training.groups_per_microbatch or 0,
            "dtype": recipe.training.dtype,
            "checkpointing": recipe.training.activation_checkpointing,
            "seed": recipe.seed,
        },
        measures=measures,
        table=tuple(rows),
    )
