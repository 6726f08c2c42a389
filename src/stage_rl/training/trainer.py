"""The parts of a run, and what the loop does with them.

Shape suffixes: N completions, T image tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stage_rl.distributed import SINGLE, World, pick_device
from stage_rl.errors import RecipeError
from stage_rl.pictures import image_grid
from stage_rl.policies.base import Policy, base_digest
from stage_rl.prompts.files import prompts_of_step
from stage_rl.recipe import Recipe
from stage_rl.rewards.judge import RewardFunctions, WeightedReward
from stage_rl.rewards.selftest import require_order
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout as sample_rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.training.checkpoint import (
    Checkpoint,
    Progress,
    TrainState,
    save_checkpoint,
    trained_parameters,
)
from stage_rl.training.memory import check_memory, gpu_memory_gb, keep_freed_memory
from stage_rl.training.metrics import (
    DecoderSize,
    RolloutStats,
    Timer,
    rates,
    report_arrays,
    untrained_mismatch,
)
from stage_rl.training.optim import build_optimizer
from stage_rl.training.parallelize import prepare_blocks, shard
from stage_rl.training.reference import build_reference
from stage_rl.training.run import RunFolder
from stage_rl.training.update import (
    MicroBatch,
    Precision,
    Update,
    UpdateStats,
    learn,
    micro_batches,
)
from stage_rl.types import Measured, Prompt, Rewards, Rollout

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
    rewards: RewardFunctions
    optimizer: torch.optim.Optimizer
    base: str
    """`base_digest` of the policy before the first step of the run."""
    ranks: World = SINGLE
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
            scoring=self.sampling.scoring(self.recipe.algorithm.logprobs),
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

    def rates(self, drawn: RolloutStats, times: Mapping[str, float]) -> dict[str, float]:
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
        verdict: Callable[[], Rewards],
        reference: Sequence[Measured],
        *,
        rate: float,
    ) -> UpdateStats | None:
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

    def save(self, root: Path, state: Progress) -> None:
        """Writes a checkpoint."""
        save_checkpoint(
            root,
            TrainState(
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


# Builds what a run is made of from its recipe, and refuses what cannot run.


def build_trainer(recipe: Recipe, prompts: tuple[Prompt, ...], ranks: World = SINGLE) -> Trainer:
    """Loads the model, spreads it over the ranks, and builds everything around it."""
    device = pick_device(recipe.training.device, key="training.device")
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
        shard(policy, reference, num_ranks=ranks.size, mixed=mixed)
    return Trainer(
        recipe=recipe,
        prompts=prompts,
        policy=policy,
        reference=reference,
        engine=Engine(policy, dtype=recipe.rollout.dtype, max_images=recipe.rollout.max_images),
        rewards=RewardFunctions(rewards),
        optimizer=build_optimizer(trained_parameters(policy.module).values(), recipe.optimizer),
        base=base,
        ranks=ranks,
    )


def check_ranks(recipe: Recipe, ranks: World, *, num_prompts: int) -> None:
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


@torch.no_grad()
def _check_prompts(policy: Policy, prompts: Sequence[Prompt], chunk: int = 64) -> None:
    """Finds a prompt that the model cannot take before the first step; a text is tried once."""
    # Backwards, so that the first prompt of a text is the one that is named.
    distinct = [*{prompt.text: prompt for prompt in reversed(prompts)}.values()][::-1]
    for first in range(0, len(distinct), chunk):
        policy.encode(distinct[first : first + chunk])


# What one pass of the loop leaves for the metrics, the checks and the run folder.
#
# Shape suffixes: P prompts, G group, N = P x G completions.


@dataclass(frozen=True)
class Step:
    """One pass of the loop; the judgement and the numbers are those of all ranks."""

    number: int
    """Counted from 0."""
    rollout: Rollout
    rewards: Rewards
    reference: Sequence[Measured]
    """By micro-batch."""
    learned: UpdateStats | None
    """None where no group was judged."""
    numbers: dict[str, float]
    """The step's metrics, without its times."""
    timer: Timer

    @property
    def grad_norm(self) -> float | None:
        """Before clipping; None for a step that had nothing to learn from."""
        return self.learned.grad_norm if self.learned else None

    def joined(self, ranks: World) -> Step:
        """The same with the samples of all ranks, whose parts are in the order of the groups."""
        learned = ranks.join(self.learned)
        if learned is not None and self.learned is not None:
            learned = replace(learned, losses=self.learned.losses)  # those of all ranks before
        return replace(
            self,
            rollout=ranks.join(self.rollout),
            reference=ranks.join(self.reference),
            learned=learned,
        )


def log_samples(run: RunFolder, step: Step, *, num_groups: int) -> None:
    """Writes a grid with rewards and reasons, and the arrays of its groups."""
    rollout, judged, size = step.rollout, step.rewards, step.rollout.group_size
    shown = rollout.prompts[:num_groups]
    rewards = judged.rewards_PG.flatten().tolist()
    count = len(shown) * size
    picture = image_grid(
        rollout.images_NHWC[:count],
        captions=[f"{rewards[i]:.2f}  {judged.reasons[i]}" for i in range(count)],
        columns=size,
        titles=[prompt.text for prompt in shown],
    )
    records = [
        {"prompt": shown[i // size].text, "reward": rewards[i], "reason": judged.reasons[i]}
        for i in range(count)
    ]
    run.log_images(step.number, picture, records)
    assert step.learned is not None, "a step that learned nothing has no arrays"
    arrays = report_arrays(rollout, judged, step.learned, step.reference, num_groups=num_groups)
    run.log_arrays(step.number, arrays)
