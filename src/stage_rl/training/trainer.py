"""The parts of a run, and what the loop does with them.

Shape suffixes: N completions, T image tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stage_rl.policies.base import Policy
from stage_rl.prompts import prompts_of_step
from stage_rl.rewards.judging import Judge
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.schema import Recipe
from stage_rl.training.batches import MicroBatch, micro_batches
from stage_rl.training.checkpoint import Checkpoint, TrainerState, save_checkpoint
from stage_rl.training.contents import Contents, trained_parameters
from stage_rl.training.distributed import ALONE, Ranks
from stage_rl.training.mismatch import untrained_mismatch
from stage_rl.training.scoring import scoring_of
from stage_rl.training.throughput import DecoderSize, Drawn, rates
from stage_rl.training.update import Learned, Precision, Update, learn
from stage_rl.types import Judged, Measured, Prompt, Rollout

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
    ranks: Ranks = ALONE
    """Where the run is spread over: prompts by rank, parameters in shards."""
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

    def untrained_mismatch(self, batch: MicroBatch) -> dict[str, float]:
        """The mismatch of some images under the distribution that is not trained."""
        return untrained_mismatch(
            self.policy,
            batch,
            self.precision,
            sampling=self.sampling,
            num_images=self.recipe.probe.mismatch_images,
        )

    def rates(self, drawn: Drawn, times: Mapping[str, float]) -> dict[str, float]:
        """What this device reached in each phase of a step; see `throughput.rates`."""
        return rates(
            DecoderSize.of(self.engine.decoder),
            drawn,
            times,
            num_images=drawn.num_rows // (2 if self.sampling.guided else 1),
            scoring=self.precision.scoring,
            num_updates=self.recipe.optimizer.updates_per_rollout,
        )

    def learn(
        self,
        batches: Sequence[MicroBatch],
        verdict: Callable[[], Judged],
        reference: Sequence[Measured],
        *,
        rate: float,
    ) -> Learned | None:
        """Learns from this rank's part of a step; the losses are those of all ranks together.

        `verdict` gives that of all ranks; None where it kept no group.
        """
        learned = learn(
            self.policy,
            self.optimizer,
            batches,
            verdict=verdict,
            reference=reference,
            update=self.update(rate),
        )
        return learned and replace(learned, losses=self.ranks.join(learned.losses))

    def probe(self) -> MicroBatch:
        """This rank's samples of the reference the run began with, drawn on first use."""
        if self._probe is None:
            settings = self.recipe.probe
            drawing = self.recipe.rollout
            engine = Engine(self.reference, dtype=drawing.dtype, max_images=drawing.max_images)
            rollout = self.sample(
                engine,
                self.ranks.share(self.prompts[: settings.num_prompts]),
                step=PROBE_STEP,
                group_size=settings.images_per_prompt,
            )
            self._probe = next(micro_batches(rollout, None, self.policy.device))
        return self._probe

    def prompts_of(self, step: int) -> Sequence[Prompt]:
        """This rank's share of the prompts that a step takes."""
        prompts = prompts_of_step(
            self.prompts,
            step=step,
            prompts_per_step=self.recipe.rollout.prompts_per_step,
            seed=self.recipe.seed,
        )
        return self.ranks.share(prompts)

    def batches(self, rollout: Rollout) -> list[MicroBatch]:
        """This rank's rollout in micro-batches, which know their places in the step."""
        return list(
            micro_batches(
                rollout,
                self.recipe.training.groups_per_microbatch,
                self.policy.device,
                first_group=self.ranks.rank * len(rollout.prompts),
            )
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
        now = dict(self.policy.module.named_parameters())
        held = dict(self.reference.module.named_parameters())
        with torch.no_grad():
            for name in trained_parameters(self.policy.module):
                held[name].copy_(now[name])
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
            Contents(
                self.policy.module,
                self.optimizer,
                self.reference.module if self._refreshed else None,
            ),
            state=state,
            keep=self.recipe.run.keep_checkpoints,
            ranks=self.ranks,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was written; other base weights are a CheckpointError."""
        checkpoint.check_base(self.base)
        if self.recipe.probe.every:
            self.probe()
        checkpoint.load_policy(self.policy.module)
        checkpoint.load_optimizer(self.optimizer, self.policy.module)
        self._refreshed = checkpoint.load_reference(self.reference.module)
