"""`stage bench memory`: the memory predicted for each phase of a step against what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor

from stage_rl.bench.base import BenchResult, benchmark, columns, peak_bytes
from stage_rl.bench.models import recipe_of
from stage_rl.errors import InputError
from stage_rl.training.loop import train_step
from stage_rl.training.memory import predict
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.training.update import learn, measure_all, measure_to_learn

BAR = "every phase within 15 %"
FARTHEST = 0.15
PHASES = ("sample", "reference", "learn")
MIB = 2**20


@benchmark(BAR, group_size=2)
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
    recipe = recipe_of(
        model,
        [
            f"rollout.release_cache={str(release_cache).lower()}",
            f"training.groups_per_microbatch={groups_per_microbatch}",
            f"training.activation_checkpointing={checkpointing}",
        ],
        num_prompts=num_prompts,
        group_size=group_size,
        guidance_scale=guidance_scale,
        dtype=dtype,
        seed=seed,
    )
    size = recipe.policy.size()
    if size is None:
        raise InputError(f"{model}: its dimensions are not known; write a folder")
    before = live_tensor_bytes()
    trainer = build_trainer(recipe, recipe.prompts.build())
    on_gpu = trainer.policy.device.type == "cuda"
    slots = int(trainer.policy.encode(trainer.prompts_of(1)).lengths_P.max())
    plan = predict(recipe, size, on_gpu=on_gpu, prompt_slots=slots)
    # The first step makes what stays: moments, cache, compiled kernels.
    train_step(trainer, 0)
    seen = _on_gpu(trainer) if on_gpu else _on_cpu(trainer, before)
    measures: dict[str, float] = {}
    rows: list[tuple[str, ...]] = [("phase", "predicted MiB", "seen MiB", "ratio")]
    for phase in PHASES:
        predicted, found = plan.totals[phase] / MIB, seen[phase] / MIB
        measures |= {
            f"{phase}_predicted_mib": predicted,
            f"{phase}_seen_mib": found,
            f"{phase}_ratio": predicted / found,
        }
        rows.append((phase, f"{predicted:.1f}", f"{found:.1f}", f"{predicted / found:.2f}"))
    worst = max((measures[f"{phase}_ratio"] for phase in PHASES), key=lambda r: abs(r - 1))
    return BenchResult(
        f"predicted is {worst:.2f}x the seen where they are farthest apart",
        abs(worst - 1) <= FARTHEST,
        measures,
        columns(*rows),
    )


def _on_gpu(trainer: Trainer) -> dict[str, float]:
    timings = train_step(trainer, 1).timer.timings
    return {phase: timings[f"memory/{phase}_gib"] * 2**30 for phase in PHASES}


def _on_cpu(trainer: Trainer, before: int) -> dict[str, float]:
    """Tensors that lie there when a phase begins, and the most that it adds."""
    seen: dict[str, float] = {}

    def phase(name: str, work: Callable[[], Any]) -> None:
        lying = live_tensor_bytes() - before
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


def live_tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # Some objects answer isinstance by importing; the type does not.
        if issubclass(type(item), Tensor):
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
