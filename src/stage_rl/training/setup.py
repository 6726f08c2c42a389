"""What a run is made of, built from its recipe.

Shape suffixes: N completions, T image tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stage_rl.errors import RecipeError
from stage_rl.policies.base import Policy
from stage_rl.prompts import prompts_of_step
from stage_rl.rewards.judging import Judge, WeightedReward
from stage_rl.rewards.selftest import require_order
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.schema import Recipe
from stage_rl.training.batches import MicroBatch, micro_batches
from stage_rl.training.checkpoint import (
    Checkpoint,
    TrainerState,
    base_digest,
    save_checkpoint,
)
from stage_rl.training.optim import build_optimizer
from stage_rl.training.scoring import scoring_of
from stage_rl.training.update import Precision, Update
from stage_rl.types import Prompt, Rollout

PROBE_STEP = 2**40
"""The step that keys the random streams of the probe set; no run gets that far."""


@dataclass
class Trainer:
    """The parts of a run. Make it with `build_trainer`."""

    recipe: Recipe
    prompts: tuple[Prompt, ...]
    policy: Policy
    reference: Policy
    engine: Engine
    judge: Judge
    optimizer: torch.optim.Optimizer
    base: str
    """`base_digest` of the policy before the first step of the run."""
    _refreshed: bool = field(default=False)
    _probe: MicroBatch | None = field(default=None)

    @functools.cached_property
    def precision(self) -> Precision:
        """Of all passes of the training module."""
        training = self.recipe.training
        return Precision(
            mixed=training.dtype == "mixed",
            round_to_bf16=self.recipe.algorithm.logprob_dtype == "bfloat16",
            logprob_rows=training.logprob_rows,
            scoring=scoring_of(self.recipe.algorithm.logprobs, self.sampling),
        )

    @functools.cached_property
    def sampling(self) -> Sampling:
        """How the recipe draws its images."""
        settings = self.recipe.rollout
        return Sampling(
            settings.guidance_scale, settings.temperature, settings.top_k, settings.top_p
        )

    def update(self, rate: float) -> Update:
        """How this recipe learns from a rollout."""
        optimizer = self.recipe.optimizer
        return Update(
            settings=self.recipe.algorithm,
            precision=self.precision,
            num_updates=optimizer.updates_per_rollout,
            rate=rate,
            max_grad_norm=optimizer.max_grad_norm,
        )

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        *,
        step: int,
        group_size: int | None = None,
    ) -> Rollout:
        """Images of the prompts as the recipe samples them."""
        return sample_rollout(
            engine,
            prompts,
            group_size=group_size or self.recipe.rollout.group_size,
            seed=self.recipe.seed,
            step=step,
            sampling=self.sampling,
        )

    def probe(self) -> MicroBatch:
        """Samples of the reference the run began with, drawn on first use."""
        if self._probe is None:
            settings = self.recipe.probe
            engine = Engine(self.reference, dtype=self.recipe.rollout.dtype)
            rollout = self.sample(
                engine,
                self.prompts[: settings.num_prompts],
                step=PROBE_STEP,
                group_size=settings.images_per_prompt,
            )
            self._probe = next(micro_batches(rollout, None, self.policy.device))
        return self._probe

    def prompts_of(self, step: int) -> tuple[Prompt, ...]:
        """The prompts that a step takes."""
        return prompts_of_step(
            self.prompts,
            step=step,
            prompts_per_step=self.recipe.rollout.prompts_per_step,
            seed=self.recipe.seed,
        )

    def refresh_reference_after(self, step: int) -> None:
        """Refreshes the reference where the recipe does so after this step."""
        every = self.recipe.algorithm.reference_refresh_every
        if every and (step + 1) % every == 0:
            self.refresh_reference()

    def refresh_reference(self) -> None:
        """Makes the policy as it is now the reference."""
        if self.recipe.probe.every:
            self.probe()  # stays on samples of the first reference
        self.reference = self.policy.reference()
        self._refreshed = True

    def is_probed(self, step: int) -> bool:
        """Whether the drift is measured after a step."""
        return self._is_due(step, self.recipe.probe.every)

    def is_logged(self, step: int) -> bool:
        """Whether a step's images and arrays go into the run folder."""
        return self._is_due(step, self.recipe.run.log_images_every)

    def _is_due(self, step: int, every: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.recipe.steps - 1)

    def save(self, root: Path, state: TrainerState) -> None:
        """Writes a checkpoint."""
        save_checkpoint(
            root,
            self.policy,
            self.optimizer,
            state=state,
            reference=self.reference if self._refreshed else None,
            keep=self.recipe.run.keep_checkpoints,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written; other base weights are a CheckpointError."""
        checkpoint.check_base(self.base)
        if self.recipe.probe.every:
            self.probe()
        checkpoint.load_policy(self.policy.module)
        checkpoint.load_optimizer(self.optimizer)
        self._refreshed = checkpoint.load_reference(self.reference.module)


def build_trainer(recipe: Recipe, prompts: tuple[Prompt, ...]) -> Trainer:
    """Loads the model and builds everything around it."""
    device = pick_device(recipe.training.device)
    policy = recipe.policy.build(device)
    _check_prompts(policy, prompts)
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    if not parameters:
        raise RecipeError("policy.trainable: is empty; name at least one parameter pattern")
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise RecipeError(
            "policy.dtype: updates of the usual size are lost in bfloat16; write "
            "policy.dtype=float32 (training.dtype=mixed computes in bfloat16)"
        )
    rewards = [WeightedReward(r.name, r.weight, r.build(device)) for r in recipe.rewards]
    for config, built in zip(recipe.rewards, rewards, strict=True):
        if config.self_test:
            require_order(config, built.reward)
    return Trainer(
        recipe=recipe,
        prompts=prompts,
        policy=policy,
        reference=policy.reference(),
        engine=Engine(policy, dtype=recipe.rollout.dtype),
        judge=Judge(rewards),
        optimizer=build_optimizer(parameters, recipe.optimizer),
        base=base_digest(policy.module),
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
