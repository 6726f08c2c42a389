"""The parts of a run: how they are built from its recipe, and what is refused before a step.

Shape suffixes: N completions, T image tokens, V codebook size, C codebook channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stage_rl.allocator import let_segments_grow
from stage_rl.distributed import SINGLE, World, pick_device
from stage_rl.errors import RecipeError
from stage_rl.evaluation.suites import find_suite
from stage_rl.objective.loss import LossFunction
from stage_rl.objective.record import CreditFunction
from stage_rl.policies.base import Policy, PolicyConfig
from stage_rl.policies.digest import base_digest
from stage_rl.policies.lora import has_adapter
from stage_rl.prompts.files import prompts_of_step
from stage_rl.recipe import Recipe
from stage_rl.rewards.check import require_order
from stage_rl.rewards.judge import RewardFunctions, build_reward
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.settings import needs_of, resolve_function
from stage_rl.training.checkpoint import (
    Checkpoint,
    Progress,
    TrainState,
    save_checkpoint,
    trained_parameters,
)
from stage_rl.training.measure import MicroBatch, Precision, micro_batches
from stage_rl.training.memory import check_memory, for_one_process, gpu_memory_gb
from stage_rl.training.optim import build_optimizer
from stage_rl.training.parallelize import prepare_blocks, require_compiler, shard
from stage_rl.training.reference import build_reference
from stage_rl.training.update import Update
from stage_rl.types import Prompt, Rollout

PROBE_STEP = 2**40
"""The step that keys the random streams of the probe set; no run gets that far."""
FIXED_STEP = PROBE_STEP + 1
"""That of the fixed prompts."""


def build_trainer(
    recipe: Recipe,
    prompts: tuple[Prompt, ...],
    world: World = SINGLE,
    *,
    say: Callable[[str], None] = lambda text: None,
    recorded_base: str = "",
) -> Trainer:
    """Loads the model, spreads it over the ranks, and builds everything around it.

    `say` hears what is being done: with a large model this takes minutes. `recorded_base` is the
    digest in the checkpoint that is gone on from: this one is made in its form.
    """
    let_segments_grow()
    device = pick_device(recipe.training.device, key="training.device")
    if recipe.training.compile and device.type == "cpu":
        require_compiler("training.compile", instead="false")
    check_memory(recipe, gpu_memory_gb(recipe), num_processes=world.size)
    say(f"policy: {recipe.policy.kind} {getattr(recipe.policy, 'path', '')} on {device}")
    policy = recipe.policy.build(device)
    _check_prompts(policy, prompts)
    _check_trained(policy, recipe.policy)
    say(f"rewards: {', '.join(reward.name for reward in recipe.rewards)}")
    rewards = [build_reward(config, device) for config in recipe.rewards]
    for config, built in zip(recipe.rewards, rewards, strict=True):
        if config.self_test:
            require_order(config, built)
    trained = trained_parameters(policy.module).values()
    num_trained, num_all = (sum(p.numel() for p in some) for some in (trained, policy.parameters()))
    say(f"reference: {num_trained:,} of {num_all:,} parameters train")
    base = base_digest(policy, like=recorded_base)
    world.check_same(base, "the weights behind policy.path")
    reference = build_reference(policy, recipe)
    checkpointing, compiled = recipe.training.activation_checkpointing, recipe.training.compile
    prepare_blocks(policy.trunk_blocks, checkpointing=checkpointing, compiled=compiled)
    if reference.module is not policy.module:
        prepare_blocks(reference.trunk_blocks, compiled=compiled)
    if world.sharded:
        mixed, shards = recipe.training.dtype == "mixed", recipe.training.shard_ranks
        shard(policy, reference, num_ranks=world.size, shard_ranks=shards, mixed=mixed)
    return Trainer(
        recipe=recipe,
        prompts=prompts,
        policy=policy,
        reference=reference,
        engine=build_engine(policy, recipe),
        rewards=RewardFunctions(rewards),
        credit=resolve_function("credit", recipe.algorithm.credit),
        loss=resolve_function("loss", recipe.algorithm.loss),
        optimizer=build_optimizer(trained_parameters(policy.module).values(), recipe.optimizer),
        base=base,
        world=world,
    )


@dataclass
class Trainer:
    """The parts of a run. Make it with `build_trainer`."""

    recipe: Recipe
    prompts: tuple[Prompt, ...]
    policy: Policy
    reference: Policy
    engine: Engine
    rewards: RewardFunctions
    credit: CreditFunction
    loss: LossFunction
    optimizer: torch.optim.Optimizer
    base: str
    """`base_digest` of the policy before the first step of the run."""
    world: World = SINGLE
    """Where the run is spread over: prompts by rank, parameters in shards."""
    refreshed: bool = False
    """Whether the reference is another than the base, so that checkpoints hold it."""

    @cached_property
    def precision(self) -> Precision:
        """Of all passes of the training module."""
        training = self.recipe.training
        return Precision(
            mixed=training.dtype == "mixed",
            round_to_bf16=self.recipe.algorithm.logprob_dtype == "bfloat16",
            logprob_rows=training.logprob_rows,
            scoring=self.sampling.scoring(self.recipe.algorithm.logprobs),
        )

    @cached_property
    def sampling(self) -> Sampling:
        """How the recipe draws its images."""
        settings = self.recipe.rollout
        return Sampling(
            self.recipe.guidance_scale,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            guided_entropy="guided_entropy" in needs_of(self.credit),
        )

    def update(self, rate: float) -> Update:
        """How this recipe learns from a rollout."""
        optimizer = self.recipe.optimizer
        return Update(
            settings=self.recipe.algorithm,
            credit=self.credit,
            loss=self.loss,
            precision=self.precision,
            num_updates=optimizer.updates_per_rollout,
            rate=rate,
            max_grad_norm=optimizer.max_grad_norm,
            kl_reference=self.reference if self.recipe.algorithm.exact_kl else None,
        )

    def prompts_of(self, step: int) -> Sequence[Prompt]:
        """This rank's share of the prompts that a step takes."""
        prompts = prompts_of_step(
            self.prompts,
            step=step,
            prompts_per_step=self.recipe.rollout.prompts_per_step,
            seed=self.recipe.seed,
        )
        return self.world.share(prompts)

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int | None = None,
    ) -> Rollout:
        """Images of the prompts as the recipe samples them."""
        rollout = sample_rollout(
            engine,
            prompts,
            group_size=group_size or self.recipe.rollout.group_size,
            seed=self.recipe.seed,
            step=step,
            sampling=self.sampling,
        )
        if self.recipe.rollout.release_cache:
            engine.release()
        return rollout

    @cached_property
    def fixed_prompts(self) -> Sequence[Prompt]:
        """The prompts that are drawn again whenever images are logged."""
        number, evaluation = self.recipe.run.fixed_prompts, self.recipe.evaluation
        if evaluation is None:
            return self.prompts[:number]
        return find_suite(evaluation.benchmark).examples(evaluation.data_folder, number)

    def draw_fixed(self) -> Rollout | None:
        """An image of each fixed prompt by the engine's weights; None where there is no prompt.

        All ranks draw at the same time: what lies outside the layers is gathered for it.
        """
        if not self.fixed_prompts:
            return None
        return self.sample(self.engine, self.fixed_prompts, step=FIXED_STEP, group_size=1)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        """The codebook vectors, codes_VC on the CPU; all ranks ask for them at the same time."""
        tokens_1V = torch.arange(self.policy.codebook_size, device=self.policy.device)[None]
        with self.policy.unsharded():
            return self.policy.codes(tokens_1V)[0].cpu()

    def batches(self, rollout: Rollout) -> list[MicroBatch]:
        """This rank's rollout in micro-batches, which know their places in the step."""
        return list(
            micro_batches(
                rollout,
                self.recipe.training.groups_per_microbatch,
                self.policy.device,
                first_group=self.world.rank * len(rollout.prompts),
            )
        )

    @cached_property
    def probe(self) -> MicroBatch:
        """This rank's samples of the reference the run began with, drawn on first use."""
        settings, engine = self.recipe.probe, build_engine(self.reference, self.recipe)
        drawn = self.sample(
            engine,
            self.world.share(self.prompts[: settings.num_prompts]),
            step=PROBE_STEP,
            group_size=settings.images_per_prompt,
        )
        return next(micro_batches(drawn, None, self.policy.device))

    def refresh_reference(self) -> None:
        """Makes the policy as it is now the reference; the probe stays one of the first."""
        self._draw_probe()
        now = dict(self.policy.module.named_parameters())
        held = dict(self.reference.module.named_parameters())
        with torch.no_grad():
            for name in trained_parameters(self.policy.module):
                held[name].copy_(now[name])
        self.refreshed = True

    def save(self, root: Path, state: Progress) -> None:
        """Writes a checkpoint."""
        reference = self.reference.module if self.refreshed else None
        save_checkpoint(
            root,
            TrainState(self.policy.module, self.optimizer, reference),
            state=state,
            keep=self.recipe.run.keep_checkpoints,
            world=self.world,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written; other base weights are a CheckpointError."""
        checkpoint.check_base(self.base)
        self._draw_probe()
        checkpoint.load_policy(self.policy.module)
        checkpoint.load_optimizer(self.optimizer, self.policy.module)
        self.refreshed = checkpoint.load_part("reference", self.reference.module)

    def _draw_probe(self) -> None:
        if self.recipe.probe.every:
            _ = self.probe


def build_engine(policy: Policy, recipe: Recipe) -> Engine:
    """The sampler of a recipe."""
    settings = recipe.rollout
    return Engine(
        policy,
        dtype=settings.dtype,
        cache_dtype=settings.cache_dtype,
        max_images=settings.max_images,
    )


def check_ranks(recipe: Recipe, world: World, *, num_prompts: int) -> None:
    """A RecipeError for what cannot be spread over the ranks; asked before anything is loaded."""
    world.check_even(recipe.rollout.prompts_per_step, "rollout.prompts_per_step")
    if recipe.probe.every:
        world.check_even(min(recipe.probe.num_prompts, num_prompts), "probe.num_prompts")
    shards = recipe.training.shard_ranks
    if shards and world.size % shards:
        raise RecipeError(
            f"training.shard_ranks: {world.size} processes cannot be split into groups of {shards} "
            "that hold a copy each; write a number that divides them, or null"
        )
    for text in for_one_process(recipe) if world.size > 1 else ():
        raise RecipeError(text)


def _check_trained(policy: Policy, settings: PolicyConfig) -> None:
    """Finds parameters that cannot train, or none, and settings that the family does not know."""
    if settings.lora and not has_adapter(policy.module):
        raise RecipeError(f"policy.lora: the policy {settings.kind} takes no adapter; write null")
    if all(p.dtype == torch.float32 for p in policy.parameters()) and settings.dtype != "float32":
        raise RecipeError(
            f"policy.dtype: the policy {settings.kind} holds its parameters in float32; write that"
        )
    parameters = trained_parameters(policy.module).values()
    if not parameters:
        raise RecipeError("policy.trainable: is empty; name at least one parameter pattern")
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise RecipeError(
            "policy.dtype: updates of the usual size are lost in bfloat16; write "
            "policy.dtype=float32 (training.dtype=mixed computes in bfloat16)"
        )


def _check_prompts(policy: Policy, prompts: Sequence[Prompt], chunk: int = 64) -> None:
    """Finds a prompt that the model cannot take before the first step; a text is tried once."""
    # Backwards, so that the first prompt of a text is the one that is named.
    distinct = [*{prompt.text: prompt for prompt in reversed(prompts)}.values()][::-1]
    for first in range(0, len(distinct), chunk):
        policy.check(distinct[first : first + chunk])
