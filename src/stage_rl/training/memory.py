"""The memory a run needs, phase by phase, from its recipe and the dimensions of its model alone.

What is counted: everything that lies on the device all the time, and the most that a phase adds to
it. What is not: reward models, and what an operation or the allocator holds beyond its tensors.
`stage bench memory` sets the prediction against what is seen. Sizes are bytes; GB are 10^9 bytes,
as in the names of GPUs.

A token of the formulas is one slot of one row: N completions of S = prompt + image - 1 slots.
"""

from __future__ import annotations

import ctypes
import fnmatch
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from pydantic import ValidationError

from stage_rl.errors import RecipeError
from stage_rl.policies.sizes import ModelSize
from stage_rl.recipe import Recipe

PROMPT_SLOTS = 32
"""Slots of a prompt that a plan assumes."""

CACHE_BLOCK = 32
"""Slots of the key-value cache come in blocks."""

IMAGES_DECODED = 32

IMAGES_DECODED_ON_CPU = 8
"""Images that the image decoder takes at one time."""

SHORT_SLOTS = 256
"""Slots up to which bf16 attention on a CPU keeps its weights."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU by phase and by what takes them; the phases are those of the metrics, and of
    several processes `load`, before anything is shared."""

    phases: Mapping[str, Mapping[str, float]]

    @property
    def totals(self) -> dict[str, float]:
        """Bytes of each phase."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return max(self.totals.values())


@dataclass(frozen=True)
class Work:
    """A recipe on a model, cut into equal parts for the processes."""

    recipe: Recipe
    policy: Any
    """Settings of a family that knows its sizes, with dtype, trainable and lora."""
    size: ModelSize
    num_processes: int
    on_gpu: bool
    prompt_slots: int

    @property
    def mixed(self) -> bool:
        """Whether the trunk computes in bf16."""
        return self.recipe.training.dtype == "mixed"

    @property
    def parameter_bytes(self) -> int:
        """Of one parameter of the module."""
        return 4 if self.policy.dtype == "float32" else 2

    @property
    def num_groups(self) -> int:
        """Groups of one process."""
        return max(1, self.recipe.rollout.prompts_per_step // self.num_processes)

    @property
    def groups_at_once(self) -> int:
        """Groups of one micro-batch."""
        return min(self.num_groups, self.recipe.training.groups_per_microbatch or self.num_groups)

    @property
    def batch_images(self) -> int:
        """Images of one micro-batch."""
        return self.groups_at_once * self.recipe.rollout.group_size

    @property
    def batch_tokens(self) -> int:
        """Slots of a micro-batch that the trunk computes with gradient."""
        rows = self.batch_images * (2 if self.recipe.algorithm.logprobs == "guided" else 1)
        return rows * (self.prompt_slots + self.size.image_tokens - 1)

    @property
    def adapter(self) -> int:
        """Parameters of the adapter; 0 without one."""
        lora = self.policy.lora
        if lora is None:
            return 0
        shapes = (s for n, s in self.size.linears.items() if n.rpartition(".")[2] in lora.targets)
        return self.size.layers * lora.rank * sum(map(sum, shapes))

    @property
    def trained(self) -> dict[str, int]:
        """Parameters of the model that train, by name; none of them under an adapter."""
        if self.policy.lora:
            return {}
        return {
            name: count
            for name, count in self.size.parameters.items()
            if any(fnmatch.fnmatchcase(name, p) for p in self.policy.trainable)
        }

    @property
    def num_trained(self) -> int:
        """Parameters that take a gradient, in all processes together."""
        return self.adapter + sum(self.trained.values())


def predict(
    recipe: Recipe,
    size: ModelSize,
    *,
    num_processes: int = 1,
    on_gpu: bool = True,
    prompt_slots: int = PROMPT_SLOTS,
) -> Plan:
    """The plan of a recipe whose policy is of this size, on each of the processes."""
    work = Work(recipe, recipe.policy, size, num_processes, on_gpu, prompt_slots)
    held = {
        "weights": _weights(work),
        "moments": _moments(work),
        "sampler's copy": _sampler(work),
        "reference": _reference(work),
    }
    rollout = recipe.rollout
    images = work.num_groups * rollout.group_size
    cache = _cache(work, min(images, rollout.max_images or images))
    kept = held | {"key-value cache": 0 if rollout.release_cache else cache}
    gathered = _gathered(work)
    phases = {
        "sample": held | {"key-value cache": cache, "images": _images(work, images)},
        "reference": kept | {"activations": _reference_pass(work) + gathered},
        "learn": kept | _learning(work, gathered),
    }
    probe = recipe.probe
    if probe.every:
        drawn = max(1, probe.num_prompts // num_processes) * probe.images_per_prompt
        cache = _cache(work, min(drawn, rollout.max_images or drawn))
        phases["probe"] = kept | {
            "probe's sampler": _sampler(work) + cache,
            "images": _images(work, drawn),
        }
    if num_processes > 1:
        alone = replace(work, num_processes=1)
        phases["load"] = {"weights": _weights(alone), "reference": _reference(alone)}
    return Plan(phases)


def _weights(work: Work) -> float:
    """Layers, and what else trains, are spread over the processes; the rest is whole on each."""
    size, width = work.size, work.parameter_bytes
    shared = sum(n for name, n in size.parameters.items() if _is_spread(work, name))
    whole = size.total - shared
    # The image head of an adapter's policy is fp32 whatever the base is.
    head = size.image_head * (4 - width) if work.policy.lora else 0
    return (shared * width + 4 * work.adapter) / work.num_processes + whole * width + head


def _is_spread(work: Work, name: str) -> bool:
    return ".layers." in name or name in work.trained


def _moments(work: Work) -> float:
    # In 8 bits each 256 numbers of a moment share a scale of 4 bytes.
    each = 8 if work.recipe.optimizer.kind == "adamw" else 2 * (1 + 4 / 256)
    return each * work.num_trained / work.num_processes


def _sampler(work: Work) -> float:
    """Matrices of the layers in the sampler's precision, all else in fp32."""
    size = work.size
    matrices = size.layers * size.layer_matrices * (2 if _samples_in_bf16(work) else 4)
    norms = (2 * size.layers + 1) * size.width
    rotary = 2 * size.positions * (size.width // size.heads)
    return matrices + 4 * (norms + rotary + size.codebook * size.width + size.image_head)


def _samples_in_bf16(work: Work) -> bool:
    return work.recipe.rollout.dtype == "mixed"


def _reference(work: Work) -> float:
    """Copies of what trains; the matrices of layers in bf16 where the trunk computes in it."""
    layers = {name: n for name, n in work.trained.items() if ".layers." in name}
    others = sum(work.trained.values()) - sum(layers.values())
    each = 2 if work.mixed else work.parameter_bytes
    held = sum(n * (each if "_proj." in name else 4) for name, n in layers.items())
    if work.recipe.training.reference == "streamed":
        held = min(held, 2 * work.size.layer_matrices * each)
    return (held + others * work.parameter_bytes) / work.num_processes


def _cache(work: Work, images: int) -> float:
    """Keys and values of all rows, in bf16 on a GPU that samples in it."""
    size, rollout = work.size, work.recipe.rollout
    rows = images * (1 if rollout.guidance_scale == 1 else 2)
    slots = math.ceil((work.prompt_slots + size.image_tokens - 1) / CACHE_BLOCK) * CACHE_BLOCK
    each = 2 if work.on_gpu and _samples_in_bf16(work) else 4
    return rows * slots * 2 * size.layers * size.kv_width * each


def _images(work: Work, images: int) -> float:
    """The image decoder: three maps of its first width at full resolution are alive at one time."""
    size = work.size
    at_once = IMAGES_DECODED if work.on_gpu else IMAGES_DECODED_ON_CPU
    maps = 3 * min(images, at_once) * size.decoder_channels * size.image_side**2
    return maps * work.parameter_bytes


def _gathered(work: Work) -> float:
    """Weights that a pass has whole while it needs them: two layers, and what trains outside."""
    if work.num_processes == 1:
        return 0
    outside = sum(n for name, n in work.trained.items() if ".layers." not in name)
    return 2 * work.size.layer_matrices * (2 if work.mixed else 4) + 4 * outside


def _reference_pass(work: Work) -> float:
    """One layer without gradient, then the image head."""
    size, wide = work.size, 2 if work.mixed else 4
    layer = (8 + 2 * wide) * size.width + 4 * wide * size.mlp
    held = 8 * size.width
    return work.batch_tokens * held + max(work.batch_tokens * layer, _head(work, arrays=3))


def _learning(work: Work, gathered: float) -> dict[str, float]:
    """Gradients, and activations as they are when the backward pass begins."""
    gradients = 4 * work.num_trained / work.num_processes
    mode = work.recipe.training.activation_checkpointing
    kept = {name: layer_bytes(work, name) for name in ("none", mode)}
    layers = work.size.layers * kept[mode]
    again = kept["none"] - kept[mode]  # one layer, computed again behind the image head
    base = 24 * work.size.width  # inputs, last states, and the gradients of both
    activations = work.batch_tokens * (layers + base) + gathered
    activations += max(work.batch_tokens * again, _head(work, arrays=4))
    casts = _casts(work) if mode == "none" else _casts(work) / work.size.layers
    if work.groups_at_once == work.num_groups:
        # The only backward pass: gradients grow while activations go.
        tail = work.batch_tokens * (kept["none"] + base)
        activations = max(activations + casts, gradients + tail + gathered) - gradients
        return {"gradients": gradients, "activations": max(0, activations)}
    return {"gradients": gradients, "activations": activations + casts}


def _casts(work: Work) -> float:
    """Copies of the matrices in bf16, which a backward pass reads."""
    if not work.mixed or work.parameter_bytes == 2 or work.num_processes > 1:
        return 0
    return 2 * work.size.layers * work.size.layer_matrices


def _head(work: Work, *, arrays: int) -> float:
    """So many fp32 arrays of the logits of one chunk of the image head."""
    rows = work.batch_images * work.size.image_tokens
    chunk = min(rows, work.recipe.training.logprob_rows)
    return 4 * chunk * (arrays * work.size.codebook + 2 * work.size.width)


def layer_bytes(work: Work, checkpointing: str) -> float:
    """What a decoder layer keeps of one token for the backward pass."""
    width, kv, mlp = work.size.width, work.size.kv_width, work.size.mlp
    if checkpointing == "full":
        return 4 * width
    adapted = work.policy.lora is not None
    slots = work.prompt_slots + work.size.image_tokens - 1
    keeps_weights = work.mixed and not work.on_gpu and slots <= SHORT_SLOTS
    # Attention keeps what it reads and its result; on a CPU in fp32, with a copy in bf16, or of
    # short sequences all in bf16.
    in_bf16 = work.mixed and (work.on_gpu or keeps_weights)
    attended = (2 if in_bf16 else 4) * (width + 2 * kv)
    attended += 2 * work.size.heads * slots if keeps_weights else 0
    mixed_out = 2 * width if in_bf16 else 4 * width + (2 * width if work.mixed else 0)
    if checkpointing == "none":
        # Residual stream before each norm, what the norms' weights read, inputs of the matrices.
        norms = (8 if adapted else 16) * width
        inputs = 10 * width if work.mixed else 8 * width
        output = 2 * width if adapted and in_bf16 else 0
        return norms + inputs + attended + mixed_out + output + (8 if work.mixed else 16) * mlp
    each = 2 if work.mixed else 4
    products = each * (3 * width + 2 * kv + 2 * mlp) * (2 if adapted else 1)
    return 4 * width + products + (2 if in_bf16 else 4) * width


# Whether a run fits its GPU, what would make it fit, and what `--dry-run` says of both.


GB = 1e9

SHARE = 0.95
"""Of a GPU's memory; the rest is left to the driver and to gaps of the allocator."""

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/[\w.-]+)*(?:@[\w./-]+)?")

PROCESSES = (1, 2, 4, 8)

ADAPTER = {"policy.lora.rank": 64, "policy.dtype": "bfloat16"}

SAVINGS = (
    ("training.groups_per_microbatch", 1),
    ("training.dtype", "mixed"),
    ("rollout.dtype", "mixed"),
    ("rollout.release_cache", True),
    ("rollout.max_images", 32),
    ("rollout.max_images", 16),
    ("rollout.max_images", 8),
    ("training.activation_checkpointing", "selective"),
    ("training.activation_checkpointing", "full"),
    ("optimizer.kind", "adamw_8bit"),
    ("training.reference", "streamed"),
)
"""What saves memory, the cheapest in time first."""

FOR_ONE_PROCESS = ("optimizer.kind", "training.reference")


def plan_of(recipe: Recipe, *, num_processes: int = 1) -> Plan | None:
    """The plan of a recipe on GPUs; None where the dimensions of its model are not known."""
    size = recipe.policy.size()
    return size and predict(recipe, size, num_processes=num_processes)


def check_memory(recipe: Recipe, memory_gb: float | None, *, num_processes: int = 1) -> None:
    """A RecipeError for a run that cannot fit the GPU, with the settings that would.

    `memory_gb` is the memory of one GPU, None where there is none.
    """
    size = recipe.policy.size()
    if memory_gb is None or size is None:
        return
    plan = predict(recipe, size, num_processes=num_processes)
    if _fits(plan, memory_gb):
        return
    phase = max(plan.totals, key=plan.totals.__getitem__)
    found = suggest_overrides(recipe, size, memory_gb, num_processes=num_processes)
    raise RecipeError(
        f"memory: the phase {phase} needs {plan.peak / GB:.0f} GB, and the GPU has "
        f"{memory_gb:.0f} GB; write {_text(found) if found else _others(recipe, size, memory_gb)}"
    )


def gpu_memory_gb(recipe: Recipe) -> float | None:
    """Memory of the GPU of a run in GB: as stated, else of the one here; None on a CPU."""
    training = recipe.training
    if training.memory_gb is not None or training.device == "cpu":
        return training.memory_gb
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GB


def suggest_overrides(
    recipe: Recipe, size: ModelSize, memory_gb: float, *, num_processes: int = 1
) -> dict[str, Any]:
    """The settings with which a recipe fits, as few as do; none where no such are known."""

    def fits(overrides: Mapping[str, Any]) -> bool:
        other = with_overrides(recipe, overrides)
        if other is None:
            return False
        return _fits(predict(other, size, num_processes=num_processes), memory_gb)

    taken: dict[str, Any] = {}
    for key, value in SAVINGS:
        if num_processes > 1 and key in FOR_ONE_PROCESS:
            continue
        changed = with_overrides(recipe, taken | {key: value})
        if changed is None or changed == with_overrides(recipe, taken):
            continue
        taken.pop(key, None)  # so that it comes last
        taken[key] = value
        if fits(taken):
            break
    else:
        return {}
    # Each that is not needed goes, and each that need not save so much becomes a cheaper one.
    for key, value in list(taken.items()):
        fewer = {other: taken[other] for other in taken if other != key}
        before = SAVINGS[: SAVINGS.index((key, value))]
        cheaper = [fewer | {key: less} for name, less in before if name == key]
        taken = next((fitting for fitting in [fewer, *cheaper] if fits(fitting)), taken)
    return taken


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe | None:
    """The recipe with other settings by dotted key; None where they contradict the rest."""
    tree: dict[str, Any] = recipe.model_dump(mode="json")
    for key, value in overrides.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner[section] = inner[section] or {}
            inner = inner[section]
        inner[name] = value
    adapted = (tree["policy"] or {}).get("lora")
    if adapted and tree["training"]["reference"] == "streamed":
        return None
    try:
        return Recipe.model_validate(tree)
    except ValidationError:
        return None


def _text(overrides: Mapping[str, Any]) -> str:
    values = {key: v if isinstance(v, str) else json.dumps(v) for key, v in overrides.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _others(recipe: Recipe, size: ModelSize, memory_gb: float) -> str:
    """More processes or an adapter, where no setting helps."""
    ways = []
    adapted = with_overrides(recipe, ADAPTER | {"optimizer.kind": "adamw"})
    if adapted is not None:
        more = suggest_overrides(adapted, size, memory_gb)
        if more or _fits(predict(adapted, size), memory_gb):
            ways.append(_text(ADAPTER | more))
    for count in PROCESSES[1:]:
        even = recipe.rollout.prompts_per_step % count == 0 and not _is_for_one(recipe)
        if even and _fits(predict(recipe, size, num_processes=count), memory_gb):
            ways.append(f"torchrun --nproc-per-node {count} for as many GPUs")
            break
    return ", or ".join(ways) if ways else "a smaller model in policy.path"


def _is_for_one(recipe: Recipe) -> bool:
    streamed = recipe.training.reference == "streamed"
    return streamed or recipe.optimizer.kind == "adamw_8bit"


def _fits(plan: Plan, memory_gb: float) -> bool:
    return plan.peak <= SHARE * memory_gb * GB


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


def _downloads(recipe: Recipe) -> list[str]:
    """The hub ids that a run reads and does not find in the local cache."""
    lines = []
    size = recipe.policy.size()
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
    repository = "--".join(path.partition("@")[0].split("/")[:2])
    return (Path(hub.HF_HUB_CACHE) / f"models--{repository}" / "snapshots").is_dir()


def _table(plan: Plan) -> list[str]:
    phases = list(plan.phases)
    parts = dict.fromkeys(part for phase in phases for part in plan.phases[phase])
    rows = [f"  {'':<18}" + "".join(f"{phase:>11}" for phase in phases)]
    for part in [*parts, "total"]:
        cells = (plan.totals[p] if part == "total" else plan.phases[p].get(part, 0) for p in phases)
        rows.append(f"  {part:<18}" + "".join(f"{bytes_ / GB:>11.1f}" for bytes_ in cells))
    return rows


# Memory that the C library keeps for the next step.


# Names and values of malloc.h in the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest block that comes from the heap, as many as the library allows."""

MOST_KEPT = 2**30
"""Bytes of free memory above which the heap is cut."""


def keep_freed_memory() -> bool:
    """Stops the C library from giving freed memory back at once; whether it can.

    A step on a CPU frees and takes the same tensors again and again. Each time, the system would
    have to clear their pages anew, which takes time. Only the GNU library can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT), mallopt(_M_TRIM_THRESHOLD, MOST_KEPT)
    return all(kept)
