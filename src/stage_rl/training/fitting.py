"""Whether a run fits its GPU, what would make it fit, and what `--dry-run` says of both.

Free of torch where no GPU is asked for. GB are 10^9 bytes, as in the names of GPUs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stage_rl.errors import RecipeError
from stage_rl.policies.config import JanusConfig
from stage_rl.policies.sizes import ModelSize, size_of
from stage_rl.schema import Recipe
from stage_rl.training.memory import Plan, predict

GB = 1e9
SHARE = 0.95
"""Of a GPU's memory; the rest is left to the driver and to gaps of the allocator."""
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/[\w.-]+)*(?:@[\w./-]+)?")
PROCESSES = (1, 2, 4, 8)
ADAPTER = "policy.lora.rank=64"

SAVINGS = (
    "training.groups_per_microbatch=1",
    "training.dtype=mixed",
    "rollout.dtype=mixed",
    "rollout.release_cache=true",
    "rollout.max_images=32",
    "rollout.max_images=16",
    "rollout.max_images=8",
    "training.activation_checkpointing=selective",
    "training.activation_checkpointing=full",
    "optimizer.kind=adamw_8bit",
    "training.reference=streamed",
)
"""What saves memory, the cheapest in time first."""
VALUES = {"1": 1, "8": 8, "16": 16, "32": 32, "64": 64, "true": True}
FOR_ONE_PROCESS = ("optimizer.kind", "training.reference")


def plan_of(recipe: Recipe, *, num_processes: int = 1) -> Plan | None:
    """The plan of a recipe on GPUs; None where the dimensions of its model are not known."""
    size = _size(recipe)
    return size and predict(recipe, size, num_processes=num_processes)


def check_memory(recipe: Recipe, memory_gb: float | None, *, num_processes: int = 1) -> None:
    """A RecipeError for a run that cannot fit the GPU, with the settings that would.

    `memory_gb` is the memory of one GPU, None where there is none.
    """
    size = _size(recipe)
    if memory_gb is None or size is None:
        return
    plan = predict(recipe, size, num_processes=num_processes)
    if _fits(plan, memory_gb):
        return
    phase = max(plan.totals, key=plan.totals.__getitem__)
    found = savings(recipe, size, memory_gb, num_processes=num_processes)
    raise RecipeError(
        f"memory: the phase {phase} needs {plan.peak / GB:.0f} GB, and the GPU has "
        f"{memory_gb:.0f} GB; write {' '.join(found) if found else _others(recipe, memory_gb)}"
    )


def gpu_memory_gb(recipe: Recipe) -> float | None:
    """Memory of the GPU of a run in GB: as stated, else of the one here; None on a CPU."""
    training = recipe.training
    if training.memory_gb is not None or training.device == "cpu":
        return training.memory_gb
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GB


def savings(
    recipe: Recipe, size: ModelSize, memory_gb: float, *, num_processes: int = 1
) -> list[str]:
    """The overrides with which a recipe fits, as few as do; none where no such are known."""
    taken: list[str] = []
    for override in SAVINGS:
        if num_processes > 1 and override.startswith(FOR_ONE_PROCESS):
            continue
        if with_overrides(recipe, [*taken, override]) in (None, with_overrides(recipe, taken)):
            continue  # refused, or no change
        taken = [known for known in taken if not _same(known, override)] + [override]
        if _fits_with(recipe, taken, size, memory_gb, num_processes):
            break
    else:
        return []
    # Each that is not needed goes, and each that need not save so much becomes a cheaper one.
    for override in list(taken):
        fewer = [known for known in taken if known != override]
        before = SAVINGS[: SAVINGS.index(override)]
        cheaper = [[*fewer, other] for other in before if _same(other, override)]
        for fitting in [fewer, *cheaper]:
            if _fits_with(recipe, fitting, size, memory_gb, num_processes):
                taken = fitting
                break
    return taken


def with_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe | None:
    """The recipe with settings of `SAVINGS`; None where they contradict others."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    for override in overrides:
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner[section] = inner[section] or {}
            inner = inner[section]
        inner[name] = VALUES.get(value, value)
    adapted = (tree["policy"] or {}).get("lora")
    if adapted and tree["training"]["reference"] == "streamed":
        return None
    try:
        return Recipe.model_validate(tree)
    except ValidationError:
        return None


def report(recipe: Recipe, memory_gb: float | None, *, num_processes: int = 1) -> list[str]:
    """What `--dry-run` says of downloads and memory."""
    lines = _downloads(recipe)
    plan = plan_of(recipe, num_processes=num_processes)
    if plan is None:
        return [*lines, "Memory: not predicted; the dimensions of the policy are not known here."]
    several = f"each of {num_processes} processes" if num_processes > 1 else "a single process"
    lines += [f"Memory of one GPU in GB, predicted for {several} without reward models:"]
    lines += _table(plan)
    needs = {
        n: plan_of(recipe, num_processes=n)
        for n in PROCESSES
        if recipe.rollout.prompts_per_step % n == 0 and (n == 1 or not _is_for_one(recipe))
    }
    by_count = ", ".join(f"{n}: {p.peak / GB:.1f}" for n, p in needs.items() if p)
    lines.append(f"Largest phase by number of processes, a GPU each: {by_count}")
    if memory_gb is None:
        lines.append("No GPU is visible and training.memory_gb is null: nothing was checked.")
    else:
        lines.append(f"Memory of the GPU: {memory_gb:.1f} GB")
    return lines


def _size(recipe: Recipe) -> ModelSize | None:
    policy = recipe.policy
    return size_of(policy.path) if isinstance(policy, JanusConfig) else None


def _fits(plan: Plan, memory_gb: float) -> bool:
    return plan.peak <= SHARE * memory_gb * GB


def _fits_with(
    recipe: Recipe, overrides: list[str], size: ModelSize, memory_gb: float, num_processes: int
) -> bool:
    other = with_overrides(recipe, overrides)
    return other is not None and _fits(predict(other, size, num_processes=num_processes), memory_gb)


def _same(one: str, other: str) -> bool:
    """Whether two overrides are of the same key."""
    return one.partition("=")[0] == other.partition("=")[0]


def _others(recipe: Recipe, memory_gb: float) -> str:
    """More processes or an adapter, where no setting helps."""
    size = _size(recipe)
    assert size is not None
    ways = []
    adapted = with_overrides(recipe, [ADAPTER, "policy.dtype=bfloat16", "optimizer.kind=adamw"])
    if adapted is not None:
        more = savings(adapted, size, memory_gb)
        if more or _fits(predict(adapted, size), memory_gb):
            ways.append(" ".join([ADAPTER, "policy.dtype=bfloat16", *more]))
    for count in PROCESSES[1:]:
        even = recipe.rollout.prompts_per_step % count == 0 and not _is_for_one(recipe)
        if even and _fits(predict(recipe, size, num_processes=count), memory_gb):
            ways.append(f"torchrun --nproc-per-node {count} for as many GPUs")
            break
    return ", or ".join(ways) if ways else "a smaller model in policy.path"


def _is_for_one(recipe: Recipe) -> bool:
    streamed = recipe.training.reference == "streamed"
    return streamed or recipe.optimizer.kind == "adamw_8bit"


def _downloads(recipe: Recipe) -> list[str]:
    """The hub ids that a run reads and does not find in the local cache."""
    lines = []
    size = _size(recipe)
    for path in dict.fromkeys(_paths(recipe.model_dump(mode="json"))):
        if Path(path).expanduser().exists() or _is_cached(path):
            continue
        known = ""
        if size and path == getattr(recipe.policy, "path", None):
            count = size.total
            known = f": {count / 1e9:.2f} billion parameters, {2 * count / GB:.1f} GB in bf16"
        lines.append(f"Would be downloaded: {path}{known}")
    return lines


def _paths(tree: Any) -> Iterable[str]:
    """Every text in the settings of policy and rewards that has the form of a hub id."""
    if isinstance(tree, Mapping):
        parts = (tree[k] for k in ("policy", "rewards")) if "rewards" in tree else tree.values()
        for part in parts:
            yield from _paths(part)
    elif isinstance(tree, list):
        for item in tree:
            yield from _paths(item)
    elif isinstance(tree, str) and tree[0:1] not in (".", "/") and HUB_ID.fullmatch(tree):
        yield tree


def _is_cached(path: str) -> bool:
    """Whether anything of the repository of a hub id lies in the local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = "--".join(path.partition("@")[0].split("/")[:2])
    return (Path(HF_HUB_CACHE) / f"models--{repository}" / "snapshots").is_dir()


def _table(plan: Plan) -> list[str]:
    phases = list(plan.phases)
    parts = dict.fromkeys(part for phase in phases for part in plan.phases[phase])
    rows = [f"  {'':<18}" + "".join(f"{phase:>11}" for phase in phases)]
    for part in [*parts, "total"]:
        cells = (plan.totals[p] if part == "total" else plan.phases[p].get(part, 0) for p in phases)
        rows.append(f"  {part:<18}" + "".join(f"{bytes_ / GB:>11.1f}" for bytes_ in cells))
    return rows
