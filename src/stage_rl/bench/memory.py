"""`stage bench memory`: the memory predicted for each phase of a step against what it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from stage_rl.bench.base import BenchResult, Group, flat, peak_bytes, table
from stage_rl.bench.models import recipe_of
from stage_rl.errors import InputError
from stage_rl.training.loop import train_step
from stage_rl.training.measure import measure_all
from stage_rl.training.memory import predict
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.training.update import learn, measure_to_learn

BAR = "every phase within 15 %"
FARTHEST = 0.15
PHASES = ("sample", "reference", "learn")
MIB = 2**20


def run(
    *,
    model: str = "shapes",
    num_prompts: PositiveInt = 8,
    group_size: Group = 8,
    overrides: str = "",
) -> BenchResult:
    """Takes two steps of the recipe shapes_geneval with these settings and looks at the second.

    On a GPU the figures are the allocator's; on a CPU the storages of tensors, those that are there
    between two phases and those that operations return in one. `overrides` are further settings,
    key=value, with spaces between, such as training.activation_checkpointing=selective.
    """
    settings = ["training.groups_per_microbatch=2", *overrides.split()]
    recipe = recipe_of(model, settings, num_prompts=num_prompts, group_size=group_size)
    size = recipe.policy.size()
    if size is None:
        raise InputError(f"{model}: its dimensions are not known; write a folder")
    before = live_tensor_bytes()
    trainer = build_trainer(recipe, recipe.prompts.build())
    on_gpu = trainer.policy.device.type == "cuda"
    prompt_length = int(trainer.policy.encode(trainer.prompts_of(1)).lengths_P.max())
    plan = predict(recipe, size, on_gpu=on_gpu, prompt_length=prompt_length)
    # The first step makes what stays: moments, cache, compiled kernels.
    train_step(trainer, 0)
    seen = _on_gpu(trainer) if on_gpu else _on_cpu(trainer, before)
    rows = {
        phase: {
            "predicted_mib": plan.totals[phase] / MIB,
            "seen_mib": seen[phase] / MIB,
            "ratio": plan.totals[phase] / seen[phase],
        }
        for phase in PHASES
    }
    worst = max((figures["ratio"] for figures in rows.values()), key=lambda ratio: abs(ratio - 1))
    return BenchResult(
        f"predicted is {worst:.2f}x the seen where they are farthest apart",
        abs(worst - 1) <= FARTHEST,
        flat(rows),
        table(rows, {"predicted_mib": ".1f", "seen_mib": ".1f", "ratio": ".2f"}),
    )


def _on_gpu(trainer: Trainer) -> dict[str, float]:
    timings = train_step(trainer, 1).timer.timings
    return {phase: timings[f"memory/{phase}_gib"] * 2**30 for phase in PHASES}


def _on_cpu(trainer: Trainer, before: int) -> dict[str, float]:
    """Tensors that lie there when a phase begins, and the most that it adds."""
    seen: dict[str, float] = {}
    results: dict[str, Any] = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        lying = live_tensor_bytes() - before
        seen[name] = lying + peak_bytes(lambda: results.update({name: work()}))
        return results[name]

    trainer.engine.reload()
    prompts = trainer.prompts_of(1)
    rollout = phase("sample", lambda: trainer.sample(trainer.engine, prompts, step=1))
    rewards = trainer.rewards.score(rollout)
    batches = trainer.batches(rollout)
    exact = trainer.recipe.algorithm.exact_kl
    reference = phase(
        "reference",
        lambda: measure_all(trainer.reference, batches, trainer.precision, with_states=exact),
    )
    update = trainer.update(rate=1e-6)
    phase(
        "learn",
        lambda: learn(
            trainer.policy,
            trainer.optimizer,
            batches,
            first=measure_to_learn(trainer.policy, batches[0], update, reference[0]),
            rewards=rewards,
            reference=reference,
            update=update,
        ),
    )
    return seen


def live_tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows."""
    gc.collect()
    # Some objects answer isinstance by importing; the type does not.
    tensors = (item for item in gc.get_objects() if issubclass(type(item), Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
