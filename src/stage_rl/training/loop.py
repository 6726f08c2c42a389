"""The training loop: sample, judge, measure, credit, learn. Start reading here.

Deliberate differences from the released code of the paper are listed in docs/decisions.md; the
objective itself is in `stage_rl.algorithm`, equation by equation.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from stage_rl.console import live_view, stop_signals
from stage_rl.distributed import World, init_distributed, pick_device
from stage_rl.errors import InputError, Stopped
from stage_rl.prompts.files import prompts_of_step
from stage_rl.recipe import Recipe
from stage_rl.rewards.judge import check_fields
from stage_rl.training.checkpoint import latest_checkpoint
from stage_rl.training.metrics import (
    RolloutStats,
    Timer,
    learning_metrics,
    over_ranks,
    overall_rates,
    reward_metrics,
    trained_mismatch,
)
from stage_rl.training.monitor import Watch, measure_drift
from stage_rl.training.optim import learning_rate
from stage_rl.training.resample import resample
from stage_rl.training.run import RunFolder, check_run, open_run
from stage_rl.training.trainer import (
    Step,
    Trainer,
    build_trainer,
    check_ranks,
    log_samples,
)
from stage_rl.training.update import measure_all
from stage_rl.types import Prompt, Rewards


def train(recipe: Recipe) -> Path:
    """Trains a recipe, or goes on with its run, and returns the run folder.

    Raises `Stopped` after Ctrl-C or SIGTERM, when the step is done and saved; a `StageError` for
    everything else that ends a run.
    """
    with init_distributed(pick_device(recipe.training.device, key="training.device")) as ranks:
        return train_on(recipe, ranks)


def train_on(recipe: Recipe, ranks: World) -> Path:
    """`train` by one of the processes of a run; all of them call it."""
    prompts = recipe.prompts.build()
    check_prompts(recipe, prompts)
    check_ranks(recipe, ranks, num_prompts=len(prompts))
    folder = ranks.broadcast_object(lambda: check_run(recipe))
    done = ranks.broadcast_object(lambda: finished_steps(folder))
    if done >= recipe.steps:
        # Nothing is written: the run may have more steps than this recipe asks for.
        with live_view(first=done, last=done, rank=ranks.rank) as view:
            view.say(_finished(recipe, folder, done))
        return folder.path
    # What can be wrong with a recipe shows here, before the run folder says what is trained in it.
    trainer = build_trainer(recipe, prompts, ranks)
    with open_run(recipe, ranks) as run, stop_signals() as signals:
        train_steps(trainer, run, signals)
    return run.path


def train_steps(trainer: Trainer, run: RunFolder, signals: Sequence[int]) -> None:
    """All steps from the newest checkpoint on; `signals` fills while they run."""
    recipe, ranks = trainer.recipe, trainer.ranks
    saved = ranks.broadcast_object(lambda: latest_checkpoint(run.checkpoints))
    first = saved.state.step if saved else 0
    watch = Watch(recipe, saved.state if saved else None)
    with live_view(first=first, last=recipe.steps, rank=ranks.rank) as view:
        if saved:
            trainer.restore(saved)
            view.say(f"{run.path}: goes on after step {first}")
        if ranks.first:
            run.forget_after(first)
        for step in range(first, recipe.steps):
            taken = train_step(trainer, step)
            watch.look(trainer, taken, view.say)
            if ranks.first:
                view.show(step + 1, record(trainer, run, taken))
            watch.check(taken, view.say)
            every, done = recipe.run.save_every, step + 1
            stopped = ranks.any_of(signals[0] if signals else None)
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
    recipe, timer = trainer.recipe, Timer()
    # Sample: G images of every prompt, from copies of the weights as they are now.
    trainer.engine.reload()
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(step), step=step)
    timer.record("sample_s")
    drawn = RolloutStats.of(trainer.engine.passes)

    # Judge, while reference and policy measure; where the recipe asks so, draw equal rewards again
    # first.
    verdict, numbers = trainer.rewards.submit(rollout), {}
    if recipe.rollout.resample_equal_groups:
        rollout, verdict, numbers = resample(trainer, rollout, verdict, step=step)
        timer.record("resample_s")
    batches = trainer.batches(rollout)
    reference = measure_all(trainer.reference, batches, trainer.precision)
    timer.record("reference_s")
    numbers |= trainer.untrained_mismatch(batches[0])
    timer.record("mismatch_s")

    # Measure the policy, wait for the verdict, credit each token, learn: one pass of the policy
    # where there is one update.
    rate = learning_rate(step, recipe.steps, recipe.optimizer)
    judged = functools.cache(functools.partial(awaited, trainer, verdict, timer))
    learned = trainer.learn(batches, judged, reference, rate=rate)
    timer.record("learn_s")
    if learned:
        numbers |= learning_metrics(learned, reference)
        numbers |= trained_mismatch(learned.measured, rollout, recipe.algorithm)
        numbers |= trainer.rates(drawn, timer.timings)

    # Watch the drift from the reference on its own samples.
    if trainer.is_probed(step):
        drift = measure_drift(trainer.policy, trainer.reference, trainer.probe(), trainer.precision)
        numbers |= {"probe/kl": drift.kl, "probe/entropy_drift": drift.entropy}
        timer.record("probe_s")
    trainer.refresh_reference_after(step)

    numbers = over_ranks(trainer.ranks.gather(numbers))
    numbers |= reward_metrics(judged()) | {"optimizer/lr": rate}
    taken = Step(step, rollout, judged(), reference, learned, numbers, timer)
    return taken.joined(trainer.ranks) if trainer.is_logged(step) else taken


def awaited(trainer: Trainer, verdict: Future[Rewards], timer: Timer) -> Rewards:
    """The verdict on the images of all ranks, which is asked for while the step learns."""
    timer.record("learn_s")
    judged = trainer.ranks.join(verdict.result())
    timer.record("judge_wait_s")
    return judged


def record(trainer: Trainer, run: RunFolder, taken: Step) -> dict[str, float]:
    """Writes a step into the run folder, the samples where they are due; returns its numbers."""
    if taken.learned and trainer.is_logged(taken.number):
        log_samples(run, taken, num_groups=trainer.recipe.run.log_groups)
        taken.timer.record("log_s")
    numbers = taken.numbers | taken.timer.times()
    numbers |= overall_rates(taken.rewards.rewards_PG.numel(), taken.rollout, numbers)
    run.log_metrics(taken.number, numbers)
    return numbers
