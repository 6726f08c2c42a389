"""The training loop: sample, judge, measure, credit, learn. Start reading here.

Deliberate differences from the released code of the paper are listed in docs/decisions.md; the
objective itself is in `stage_rl.algorithm`, equation by equation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stage_rl.errors import InputError, Stopped
from stage_rl.prompts import prompts_of_step
from stage_rl.rewards.judging import check_fields
from stage_rl.schema import Recipe
from stage_rl.training.batches import micro_batches
from stage_rl.training.checkpoint import latest_checkpoint
from stage_rl.training.clock import Clock
from stage_rl.training.console import live_view
from stage_rl.training.metrics import learning_metrics, reward_metrics
from stage_rl.training.mismatch import trained_mismatch, untrained_mismatch
from stage_rl.training.optim import learning_rate
from stage_rl.training.probe import measure_drift
from stage_rl.training.resample import redraw
from stage_rl.training.runs import RunFolder, check_run, open_run
from stage_rl.training.setup import Trainer, build_trainer
from stage_rl.training.signals import stop_signals
from stage_rl.training.steps import Step, log_samples
from stage_rl.training.update import learn, measure_all
from stage_rl.training.watch import Watch
from stage_rl.types import Prompt


def train(recipe: Recipe) -> Path:
    """Trains a recipe, or goes on with its run, and returns the run folder.

    Raises `Stopped` after Ctrl-C or SIGTERM, when the step is done and saved; a `StageError` for
    everything else that ends a run.
    """
    prompts = recipe.prompts.build()
    check_prompts(recipe, prompts)
    folder = check_run(recipe)
    done = finished_steps(folder)
    if done >= recipe.steps:
        # Nothing is written: the run may have more steps than this recipe asks for.
        with live_view(first=done, last=done) as view:
            view.say(_finished(recipe, folder, done))
        return folder.path
    # What can be wrong with a recipe shows here, before the run folder says what is trained in it.
    trainer = build_trainer(recipe, prompts)
    with open_run(recipe) as run, stop_signals() as signals:
        train_steps(trainer, run, signals)
    return run.path


def train_steps(trainer: Trainer, run: RunFolder, signals: Sequence[int]) -> None:
    """All steps from the newest checkpoint on; `signals` fills while they run."""
    recipe, saved = trainer.recipe, latest_checkpoint(run.checkpoints)
    first = saved.state.step if saved else 0
    watch = Watch(recipe, saved.state if saved else None)
    with live_view(first=first, last=recipe.steps) as view:
        if saved:
            trainer.restore(saved)
            view.say(f"{run.path}: goes on after step {first}")
        run.forget_after(first)
        for step in range(first, recipe.steps):
            taken = train_step(trainer, step)
            watch.look(trainer, taken, view.say)
            view.show(step + 1, record(trainer, run, taken))
            watch.check(taken, view.say)
            every, done = recipe.run.save_every, step + 1
            stopped = signals[0] if signals else None
            due = done == recipe.steps or (every and done % every == 0)
            if stopped or due or watch.is_best(done):
                trainer.save(run.checkpoints, watch.state(done, trainer.base))
            if stopped:
                raise Stopped(
                    f"{run.path}: stopped after step {done} and saved; run the same command "
                    "again to go on",
                    signal_number=stopped,
                )


def check_prompts(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Finds a prompt set that the rewards, the rollout or the random streams cannot use."""
    check_fields(recipe.rewards, prompts)
    prompts_of_step(prompts, step=0, prompts_per_step=recipe.rollout.prompts_per_step, seed=0)
    for index, count in Counter(prompt.index for prompt in prompts).items():
        if count > 1:
            raise InputError(
                f"prompts: {count} prompts have index {index} and would share its random streams; "
                "give every prompt its own index"
            )


def finished_steps(run: RunFolder) -> int:
    """The steps of a run's newest good checkpoint; 0 where it has none."""
    saved = latest_checkpoint(run.checkpoints)
    return saved.state.step if saved else 0


def _finished(recipe: Recipe, run: RunFolder, done: int) -> str:
    schedule = recipe.optimizer.schedule
    course = f" (in a longer run the {schedule} schedule lowers the rate later)"
    return (
        f"{run.path}: finished after {done} steps; raise steps to go on"
        f"{'' if schedule == 'constant' else course}"
    )


def train_step(trainer: Trainer, step: int) -> Step:
    """One pass of the loop."""
    recipe, clock = trainer.recipe, Clock()
    # Sample: G images of every prompt, from copies of the weights as they are now.
    trainer.engine.reload()
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(step), step=step)
    clock.lap("sample_s")

    # Judge, while the reference measures; where the recipe asks so, draw equal rewards again first.
    verdict, numbers = trainer.judge.submit(rollout), {}
    if recipe.rollout.resample_equal_groups:
        rollout, verdict, numbers = redraw(trainer, rollout, verdict, step=step)
        clock.lap("resample_s")
    batches = list(
        micro_batches(rollout, recipe.training.groups_per_microbatch, trainer.policy.device)
    )
    reference = measure_all(trainer.reference, batches, trainer.precision)
    clock.lap("reference_s")
    judged = verdict.result()
    clock.lap("judge_wait_s")

    # Measure the policy, credit each token, learn: one pass where there is one update.
    rate, learned = learning_rate(step, recipe.steps, recipe.optimizer), None
    if judged.kept_P.any():
        numbers |= untrained_mismatch(
            trainer.policy,
            batches[0],
            trainer.precision,
            sampling=trainer.sampling,
            num_images=recipe.probe.mismatch_images,
        )
        clock.lap("mismatch_s")
        learned = learn(
            trainer.policy,
            trainer.optimizer,
            batches,
            judged=judged,
            reference=reference,
            update=trainer.update(rate),
        )
    clock.lap("learn_s")

    numbers |= reward_metrics(judged) | {"optimizer/lr": rate}
    if learned:
        numbers |= learning_metrics(learned, reference)
        numbers |= trained_mismatch(learned.measured, rollout, recipe.algorithm)
    # Watch the drift from the reference on its own samples.
    if trainer.is_probed(step):
        drift = measure_drift(trainer.policy, trainer.reference, trainer.probe(), trainer.precision)
        numbers |= {"probe/kl": drift.kl, "probe/entropy_drift": drift.entropy}
        clock.lap("probe_s")
    trainer.refresh_reference_after(step)
    return Step(step, rollout, judged, reference, learned, numbers, clock)


def record(trainer: Trainer, run: RunFolder, taken: Step) -> dict[str, float]:
    """Writes a step into the run folder, the samples where they are due; returns its numbers."""
    if taken.learned and trainer.is_logged(taken.number):
        log_samples(run, taken, num_groups=trainer.recipe.run.log_groups)
        taken.clock.lap("log_s")
    numbers = taken.numbers | taken.clock.times()
    numbers["images_per_s"] = len(taken.rollout.tokens_NT) / numbers["time/step_s"]
    run.log_metrics(taken.number, numbers)
    return numbers
