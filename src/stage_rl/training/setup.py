"""Builds what a run is made of from its recipe, and refuses what cannot run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stage_rl.errors import RecipeError
from stage_rl.policies.base import Policy
from stage_rl.rewards.judging import Judge, WeightedReward
from stage_rl.rewards.selftest import require_order
from stage_rl.rollout.engine import Engine
from stage_rl.schema import Recipe
from stage_rl.training.blocks import prepare_blocks
from stage_rl.training.contents import base_digest, trained_parameters
from stage_rl.training.distributed import ALONE, Ranks
from stage_rl.training.fitting import check_memory, gpu_memory_gb
from stage_rl.training.heap import keep_freed_memory
from stage_rl.training.optim import build_optimizer
from stage_rl.training.reference import build_reference
from stage_rl.training.sharding import shard_both
from stage_rl.training.trainer import Trainer
from stage_rl.types import Prompt


def build_trainer(recipe: Recipe, prompts: tuple[Prompt, ...], ranks: Ranks = ALONE) -> Trainer:
    """Loads the model, spreads it over the ranks, and builds everything around it."""
    device = pick_device(recipe.training.device)
    if device.type == "cpu":
        keep_freed_memory()
    check_memory(recipe, gpu_memory_gb(recipe), num_processes=ranks.size)
    policy = recipe.policy.build(device)
    _check_prompts(policy, prompts)
    _check_trained(policy)
    rewards = [WeightedReward(r.name, r.weight, r.build(device)) for r in recipe.rewards]
    for config, built in zip(recipe.rewards, rewards, strict=True):
        if config.self_test:
            require_order(config, built.reward)
    base = base_digest(policy.module)
    ranks.check_same(base, "the weights behind policy.path")
    reference = build_reference(policy, recipe)
    prepare_blocks(
        policy.trunk_blocks,
        checkpointing=recipe.training.activation_checkpointing,
        compiled=recipe.training.compile,
    )
    if ranks.size > 1:
        mixed = recipe.training.dtype == "mixed"
        policy, reference = shard_both(policy, reference, num_ranks=ranks.size, mixed=mixed)
    return Trainer(
        recipe=recipe,
        prompts=prompts,
        policy=policy,
        reference=reference,
        engine=Engine(policy, dtype=recipe.rollout.dtype, max_images=recipe.rollout.max_images),
        judge=Judge(rewards),
        optimizer=build_optimizer(trained_parameters(policy.module).values(), recipe.optimizer),
        base=base,
        ranks=ranks,
    )


def check_ranks(recipe: Recipe, ranks: Ranks, *, num_prompts: int) -> None:
    """A RecipeError for what cannot be spread over the ranks; asked before anything is loaded."""
    ranks.check_even(recipe.rollout.prompts_per_step, "rollout.prompts_per_step")
    if recipe.probe.every:
        ranks.check_even(min(recipe.probe.num_prompts, num_prompts), "probe.num_prompts")
    if ranks.size == 1:
        return
    if recipe.optimizer.kind == "adamw_8bit":
        raise RecipeError(
            "optimizer.kind: adamw_8bit is for one process; write adamw, whose moments are spread "
            "over the processes"
        )
    if recipe.training.reference == "streamed":
        raise RecipeError(
            "training.reference: streamed is for one process; write resident, which is spread over "
            "the processes"
        )


def _check_trained(policy: Policy) -> None:
    """Finds parameters that cannot train, or none."""
    parameters = trained_parameters(policy.module).values()
    if not parameters:
        raise RecipeError("policy.trainable: is empty; name at least one parameter pattern")
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise RecipeError(
            "policy.dtype: updates of the usual size are lost in bfloat16; write "
            "policy.dtype=float32 (training.dtype=mixed computes in bfloat16)"
        )


def pick_device(name: str) -> torch.device:
    """auto: the GPU where there is one; a GPU that is asked for and absent is a RecipeError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("training.device: no GPU is visible here; write cpu or auto")
    return torch.device(name)


@torch.no_grad()
def _check_prompts(policy: Policy, prompts: Sequence[Prompt], chunk: int = 64) -> None:
    """Finds a prompt that the model cannot take before the first step; a text is tried once."""
    # Backwards, so that the first prompt of a text is the one that is named.
    distinct = [*{prompt.text: prompt for prompt in reversed(prompts)}.values()][::-1]
    for first in range(0, len(distinct), chunk):
        policy.encode(distinct[first : first + chunk])
