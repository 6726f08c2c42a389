"""The memory a run needs, phase by phase, from its recipe and the dimensions of its model alone.

What is counted: everything that lies on the device all the time, and the most that a phase adds to
it. What is not: reward models, and what an operation or the allocator holds beyond its tensors.
`stage bench memory` sets the prediction against what is seen. Sizes are bytes; GB are 10^9 bytes,
as in the names of GPUs.

A token of the formulas is one position of one row: N completions of S = prompt + image - 1 each.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from pydantic import ValidationError

from stage_rl.errors import RecipeError
from stage_rl.policies.base import PolicyConfig
from stage_rl.policies.loading import HUB_ID
from stage_rl.policies.logprobs import Scoring
from stage_rl.policies.sizes import ModelSize
from stage_rl.policies.trunk import MAX_POSITIONS, padded_positions
from stage_rl.recipe import Recipe
from stage_rl.rollout.attention import BLOCK
from stage_rl.settings import needs_of, resolve_function
from stage_rl.training.measure import spares_a_pass

GB = 1e9

SHARE = 0.95
"""Of a GPU's memory; the rest is left to the driver and to gaps of the allocator."""

PROMPT_LENGTH = 32
"""Positions of a prompt that a plan assumes."""


@dataclass(frozen=True)
class Plan:
    """Bytes of one GPU by phase and by what takes them.

    The phases are those of the metrics, and of several processes `load`, before anything is shared.
    """

    phases: dict[str, dict[str, float]]

    @property
    def totals(self) -> dict[str, float]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        return max(self.totals.values())

    def fits(self, memory_gb: float) -> bool:
        """Whether a GPU of that memory holds every phase."""
        return self.peak <= SHARE * memory_gb * GB


def predict(
    recipe: Recipe,
    size: ModelSize,
    *,
    num_processes: int = 1,
    on_gpu: bool = True,
    prompt_length: int = PROMPT_LENGTH,
) -> Plan:
    """The plan of a recipe whose policy is of this size, on each of the processes."""
    work = Work(recipe, size, num_processes, on_gpu, prompt_length)
    rollout, probe = recipe.rollout, recipe.probe
    # 8-bit states: each 256 numbers of a moment share a scale of 4 bytes.
    each = 8 if recipe.optimizer.kind == "adamw" else 2 * (1 + 4 / 256)
    held = {
        "weights": _weights(work),
        "moments": each * work.per_process,
        "sampler's copy": _sampler(work),
        "reference": _reference(work),
    }
    if size.frozen_bytes:
        held["text encoder"] = size.frozen_bytes
    images = work.num_groups * rollout.group_size
    cache = _cache(work, images)
    kept = held | {"key-value cache": cache if work.keeps_cache else 0}
    if recipe.algorithm.exact_kl:
        both = 2 if recipe.algorithm.logprobs != "conditional" else 1
        kept["reference's states"] = 4 * images * size.image_tokens * both * size.width
    unsharded = _unsharded(work)
    phases = {
        "sample": held | {"key-value cache": cache, "images": _images(work, images)},
        "reference": kept | {"activations": _reference_pass(work) + unsharded},
        "learn": kept | _learning(work, unsharded),
    }
    if probe.every:
        drawn = max(1, probe.num_prompts // num_processes) * probe.images_per_prompt
        phases["probe"] = kept | {
            "probe's sampler": _sampler(work) + _cache(work, drawn),
            "images": _images(work, drawn),
        }
    if num_processes > 1:
        alone = replace(work, num_processes=1)
        phases["load"] = {"weights": _weights(alone), "reference": _reference(alone)}
        phases["load"] |= {"text encoder": size.frozen_bytes} if size.frozen_bytes else {}
    return Plan(phases)


@dataclass(frozen=True)
class Work:
    """A recipe on a model, cut into equal parts for the processes."""

    recipe: Recipe
    size: ModelSize
    num_processes: int = 1
    on_gpu: bool = True
    prompt_length: int = PROMPT_LENGTH

    @property
    def policy(self) -> PolicyConfig:
        return self.recipe.policy

    @property
    def mixed(self) -> bool:
        """Whether the trunk computes in bf16."""
        return self.recipe.training.dtype == "mixed"

    @property
    def samples_mixed(self) -> bool:
        return self.recipe.rollout.dtype == "mixed"

    @property
    def keeps_cache(self) -> bool:
        """Whether the cache outlives a pass."""
        return not self.recipe.rollout.release_cache

    @property
    def num_shards(self) -> int:
        """Processes that share one copy of what is spread."""
        return min(self.recipe.training.shard_ranks or self.num_processes, self.num_processes)

    @property
    def parameter_bytes(self) -> int:
        """Of one parameter of the module."""
        return 4 if self.policy.dtype == "float32" else 2

    @property
    def num_groups(self) -> int:
        return max(1, self.recipe.rollout.prompts_per_step // self.num_processes)

    @property
    def groups_at_once(self) -> int:
        return min(self.num_groups, self.recipe.training.groups_per_microbatch or self.num_groups)

    @property
    def batch_images(self) -> int:
        return self.groups_at_once * self.recipe.rollout.group_size

    @property
    def decode_positions(self) -> int:
        """Positions of one row of the sampler."""
        return self.prompt_length + self.size.columns - 1

    @property
    def num_positions(self) -> int:
        """Positions of one row of a training pass."""
        return padded_positions(self.decode_positions, on_gpu=self.on_gpu)

    @property
    def batch_tokens(self) -> int:
        """Positions of a micro-batch that the trunk computes with gradient."""
        two_rows = self.recipe.algorithm.logprobs == "guided"
        return self.batch_images * (2 if two_rows else 1) * self.num_positions

    @property
    def scoring(self) -> Scoring:
        """The distribution that is scored."""
        return Scoring(self.recipe.algorithm.logprobs, self.recipe.guidance_scale)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the rule of token credit needs."""
        return needs_of(resolve_function("credit", self.recipe.algorithm.credit))

    @property
    def adapter(self) -> int:
        """Parameters of the adapter; 0 without one."""
        lora = self.policy.lora
        if lora is None:
            return 0
        shapes = (s for n, s in self.size.linears.items() if n.rpartition(".")[2] in lora.targets)
        return self.size.layers * lora.rank * sum(map(sum, shapes))

    def trained(self, parameters: Mapping[str, int]) -> dict[str, int]:
        """Those of the model's parameters that train; none under an adapter."""
        patterns = () if self.policy.lora else self.policy.trainable
        return {
            name: count
            for name, count in parameters.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }

    @property
    def trained_outside(self) -> int:
        """Parameters outside the layers that train."""
        return sum(self.trained(self.size.outside).values())

    @property
    def per_process(self) -> float:
        """Parameters that take a gradient, by process."""
        trained = sum(self.trained(self.size.parameters).values())
        return (self.adapter + trained) / self.num_shards


def _weights(work: Work) -> float:
    """Layers, and what else trains, are spread over the processes; the rest is whole on each."""
    size, width = work.size, work.parameter_bytes
    shared = sum(size.in_layers.values()) + work.trained_outside
    # The image head of an adapter's policy is fp32 whatever the base is.
    head = size.image_head * (4 - width) if work.policy.lora else 0
    spread = (shared * width + 4 * work.adapter) / work.num_shards
    return spread + (size.total - shared) * width + head


def _sampler(work: Work) -> float:
    """Matrices of the layers in the sampler's precision, all else in fp32."""
    size = work.size
    matrices = size.layers * size.layer_matrices * (2 if work.samples_mixed else 4)
    norms = (2 * size.layers + 1) * size.width
    rotary = 2 * size.positions * (size.width // size.heads)
    return matrices + 4 * (norms + rotary + size.inputs * size.width + size.image_head)


def _reference(work: Work) -> float:
    """Copies of what trains; the matrices of layers in bf16 where the trunk computes in it."""
    layers = work.trained(work.size.in_layers)
    matrices = sum(count for name, count in layers.items() if work.size.is_matrix(name))
    each = 2 if work.mixed else work.parameter_bytes
    held = matrices * each + 4 * (sum(layers.values()) - matrices)
    if work.recipe.training.reference == "streamed":
        held = min(held, 2 * work.size.layer_matrices * each)
    return (held + work.trained_outside * work.parameter_bytes) / work.num_shards


def _cache(work: Work, images: int) -> float:
    """Keys and values of all rows of a pass, in bf16 where linear layers are."""
    size, recipe = work.size, work.recipe
    rows = min(images, recipe.rollout.max_images or images)
    rows *= 1 if recipe.guidance_scale == 1 else 2
    length = math.ceil(work.decode_positions / BLOCK) * BLOCK
    each: float = 2 if work.samples_mixed else 4
    if recipe.rollout.cache_dtype == "fp8":
        each = 1 + 4 * size.heads / size.width  # a scale for each head
    return rows * length * 2 * size.layers * size.kv_width * each


def _images(work: Work, images: int) -> float:
    """The image decoder: what is alive at one time at full resolution."""
    size = work.size
    at_once = min(images, size.images_at_once if work.on_gpu else size.images_at_once_on_cpu)
    return at_once * size.decoder_channels * size.pixels * work.parameter_bytes


def _unsharded(work: Work) -> float:
    """Weights that a pass has whole while it needs them: two layers, and what trains outside."""
    if work.num_processes == 1:
        return 0
    return 2 * work.size.layer_matrices * (2 if work.mixed else 4) + 4 * work.trained_outside


def _reference_pass(work: Work) -> float:
    """One layer without gradient, then the image head."""
    size, wide = work.size, 2 if work.mixed else 4
    layer = (8 + 2 * wide) * size.width + 4 * wide * size.mlp
    held = 8 * size.width
    return work.batch_tokens * held + max(work.batch_tokens * layer, _head(work, arrays=3))


def _learning(work: Work, unsharded: float) -> dict[str, float]:
    """Gradients, and activations as they are when the backward pass begins."""
    gradients = 4 * work.per_process
    mode = work.recipe.training.activation_checkpointing
    kept = {name: layer_bytes(work, name) for name in ("none", mode)}
    layers = work.size.layers * kept[mode]
    again = kept["none"] - kept[mode]  # one layer, computed again behind the image head
    base = 24 * work.size.width  # inputs, last states, and the gradients of both
    activations = work.batch_tokens * (layers + base) + unsharded + _kept_states(work)
    arrays = 7 if work.recipe.algorithm.exact_kl else 4
    activations += max(work.batch_tokens * again, _head(work, arrays=arrays), _credit(work))
    casts = 0.0
    if work.mixed and work.parameter_bytes == 4 and work.num_processes == 1:
        # Copies of the matrices in bf16, which a backward pass reads.
        casts = 2 * work.size.layer_matrices * (work.size.layers if mode == "none" else 1)
    if work.groups_at_once < work.num_groups:
        return {"gradients": gradients, "activations": activations + casts}
    # The only backward pass: gradients grow while activations go.
    tail = work.batch_tokens * (kept["none"] + base)
    activations = max(activations + casts, gradients + tail + unsharded) - gradients
    return {"gradients": gradients, "activations": max(0, activations)}


def _credit(work: Work) -> float:
    """What the rule of token credit needs beyond a step's own passes, beside the activations and
    the states that it keeps.
    """
    size = work.size
    states = 4 * work.batch_images * size.image_tokens * size.width
    own_pass = 0 if work.scoring.has_two_passes else _reference_pass(work)
    own_states = 0 if work.scoring.has_two_passes else states
    known = {
        # The inputs of the decoder, and in fp32 at length 1.
        "embeddings": states * (1 + work.parameter_bytes / 4),
        "unconditional": max(own_pass, _head(work, arrays=3)),
        "exact_guidance": max(own_pass, own_states + _head(work, arrays=6)),
    }
    return max((known.get(name, 0.0) for name in work.needs), default=0.0)


def _kept_states(work: Work) -> float:
    """The states of a micro-batch, and of the first, that spare the rule of token credit a pass."""
    if not spares_a_pass(work.needs, work.scoring):
        return 0
    size, several = work.size, work.groups_at_once < work.num_groups
    width = size.width * (2 if work.scoring.has_two_passes else 1)
    return (2 if several else 1) * 4 * work.batch_images * size.image_tokens * width


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
    keeps_weights = work.mixed and not work.on_gpu and work.num_positions <= MAX_POSITIONS
    # Attention keeps what it reads and its result; on a CPU in fp32, with a copy in bf16, or of
    # short sequences all in bf16.
    in_bf16 = work.mixed and (work.on_gpu or keeps_weights)
    attended = (2 if in_bf16 else 4) * (width + 2 * kv)
    attended += 2 * work.size.heads * work.num_positions if keeps_weights else 0
    mixed_out = 2 * width if in_bf16 else 4 * width + (2 * width if work.mixed else 0)
    if checkpointing == "none":
        # Residual stream before each norm, what the norms' weights read, inputs of the matrices.
        norms = (8 if adapted else 16) * width
        inputs = 10 * width if work.mixed else 8 * width
        output = 2 * width if adapted and in_bf16 else 0
        return norms + inputs + attended + mixed_out + output + (8 if work.mixed else 16) * mlp
    each = 2 if work.mixed else 4
    matmuls = each * (3 * width + 2 * kv + 2 * mlp) * (2 if adapted else 1)
    return 4 * width + matmuls + (2 if in_bf16 else 4) * width


# Whether a run fits its GPU, what would make it fit, and what `--dry-run` says of both.


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

FOR_ONE_PROCESS = {
    "optimizer.kind": ("adamw_8bit", "adamw"),
    "training.reference": ("streamed", "resident"),
}
"""Keys that name something for one process: its value, and one for several."""


def for_one_process(recipe: Recipe) -> list[str]:
    """What a recipe has that several processes cannot have, and what to write instead."""
    return [
        f"{key}: {value} is for one process; write {other}, which is spread over the processes"
        for key, (value, other) in FOR_ONE_PROCESS.items()
        if value in (recipe.optimizer.kind, recipe.training.reference)
    ]


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
    if plan.fits(memory_gb):
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
    return torch.cuda.get_device_properties().total_memory / GB


def suggest_overrides(
    recipe: Recipe, size: ModelSize, memory_gb: float, *, num_processes: int = 1
) -> dict[str, Any]:
    """The settings with which a recipe fits, as few as do; none where no such are known."""

    def fits(overrides: Mapping[str, Any]) -> bool:
        other = with_overrides(recipe, overrides)
        return other is not None and predict(other, size, num_processes=num_processes).fits(
            memory_gb
        )

    chosen: dict[str, Any] = {}
    for key, value in SAVINGS:
        if num_processes > 1 and key in FOR_ONE_PROCESS:
            continue
        more = {k: v for k, v in chosen.items() if k != key} | {key: value}
        if with_overrides(recipe, more) in (None, with_overrides(recipe, chosen)):
            continue
        chosen = more
        if fits(chosen):
            break
    else:
        return {}
    # Each that is not needed goes, and each that need not save so much becomes a cheaper one.
    for key, value in list(chosen.items()):
        fewer = {other: chosen[other] for other in chosen if other != key}
        before = SAVINGS[: SAVINGS.index((key, value))]
        cheaper = [fewer | {key: less} for name, less in before if name == key]
        chosen = next((fitting for fitting in [fewer, *cheaper] if fits(fitting)), chosen)
    return chosen


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
    if tree["policy"].get("lora") and tree["training"]["reference"] == "streamed":
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
        if more or predict(adapted, size).fits(memory_gb):
            ways.append(_text(ADAPTER | more))
    plans = _by_count(recipe, size).items()
    fitting = [count for count, plan in plans if count > 1 and plan.fits(memory_gb)]
    if fitting:
        ways.append(f"torchrun --nproc-per-node {fitting[0]} for as many GPUs")
    return ", or ".join(ways) if ways else "a smaller model in policy.path"


def _by_count(recipe: Recipe, size: ModelSize) -> dict[int, Plan]:
    """The plan on each number of processes that the recipe can be spread over."""
    return {
        count: predict(recipe, size, num_processes=count)
        for count in (PROCESSES[:1] if for_one_process(recipe) else PROCESSES)
        if recipe.rollout.prompts_per_step % count == 0
        and count % (recipe.training.shard_ranks or 1) == 0
    }


def report(recipe: Recipe, memory_gb: float | None, *, num_processes: int = 1) -> list[str]:
    """What `--dry-run` says of downloads and memory."""
    size = recipe.policy.size()
    lines = _downloads(recipe, size)
    if size is None:
        return [*lines, "Memory: not predicted; the dimensions of the policy are not known here."]
    several = f"each of {num_processes} processes" if num_processes > 1 else "a single process"
    lines += [f"Memory of one GPU in GB, predicted for {several} without reward models:"]
    lines += _table(predict(recipe, size, num_processes=num_processes))
    counts = ", ".join(f"{n}: {p.peak / GB:.1f}" for n, p in _by_count(recipe, size).items())
    lines.append(f"Largest phase by number of processes, a GPU each: {counts}")
    if memory_gb is None:
        lines.append("No GPU is visible and training.memory_gb is null: nothing was checked.")
    else:
        lines.append(f"Memory of the GPU: {memory_gb:.1f} GB")
    return lines


def _downloads(recipe: Recipe, size: ModelSize | None) -> list[str]:
    """The hub ids that a run reads and does not find in the local cache."""
    lines = []
    settings = recipe.model_dump(mode="json", include={"policy", "rewards"})
    for path in dict.fromkeys(_hub_ids(settings)):
        if Path(path).expanduser().exists() or _is_cached(path):
            continue
        known = ""
        if size and path == getattr(recipe.policy, "path", None):
            count = size.total
            known = f": {count / 1e9:.2f} billion parameters, {2 * count / GB:.1f} GB in bf16"
        lines.append(f"Would be downloaded: {path}{known}")
    return lines


def _hub_ids(tree: Any) -> Iterable[str]:
    """Every text in settings that has the form of a hub id."""
    if isinstance(tree, Mapping | list):
        for part in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _hub_ids(part)
    elif isinstance(tree, str) and tree[:1] not in (".", "/") and HUB_ID.fullmatch(tree):
        yield tree


def _is_cached(path: str) -> bool:
    """Whether anything of the repository of a hub id lies in the local cache."""
    repository = "--".join(path.partition("@")[0].split("/")[:2])
    return (Path(hub.HF_HUB_CACHE) / f"models--{repository}" / "snapshots").is_dir()


def _table(plan: Plan) -> list[str]:
    columns = [plan.phases[phase] | {"total": total} for phase, total in plan.totals.items()]
    rows = [f"  {'':<18}" + "".join(f"{phase:>11}" for phase in plan.phases)]
    parts = dict.fromkeys(part for phase in plan.phases.values() for part in phase)
    for part in [*parts, "total"]:
        cells = (f"{column.get(part, 0) / GB:>11.1f}" for column in columns)
        rows.append(f"  {part:<18}" + "".join(cells))
    return rows
