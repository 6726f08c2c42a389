"""The training loop: sample, judge, measure, credit, learn. Start reading here.

To read the method, from here: `stage_rl.training.update` is what one update does,
`stage_rl.objective.credit` how rewards become the advantage and the KL coefficient of each token,
`stage_rl.objective.loss` what is minimized; `stage_rl.algorithm` holds the equations. Deliberate
differences from the released code of the paper are listed in docs/decisions.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from stage_rl.console import LiveView, live_view, stop_signals
from stage_rl.distributed import World, concat, init_distributed, pick_device
from stage_rl.errors import DivergedError, InputError, RewardError, Stopped
from stage_rl.evaluation.request import evaluation_of
from stage_rl.evaluation.run import check_evaluation
from stage_rl.openmp import overcommitment
from stage_rl.prompts.files import prompts_of_step
from stage_rl.recipe import Recipe
from stage_rl.rewards.judge import check_fields
from stage_rl.rewards.threads import RewardsPendingError, result_of
from stage_rl.training.checkpoint import latest_checkpoint
from stage_rl.training.measure import measure_all
from stage_rl.training.metrics import (
    DecoderSize,
    RolloutStats,
    Step,
    Timer,
    cut_metrics,
    learning_metrics,
    log_samples,
    over_ranks,
    peak_bf16,
    rates,
    reward_metrics,
    traced,
    trained_mismatch,
    untrained_mismatch,
)
from stage_rl.training.monitor import Monitor, measure_drift
from stage_rl.training.optim import learning_rate
from stage_rl.training.resample import resample
from stage_rl.training.run import RunFolder, check_run, open_run
from stage_rl.training.trackers import OnStep, check_trackers, tracked
from stage_rl.training.trainer import Trainer, build_trainer, check_ranks
from stage_rl.training.update import Update, learn, measure_to_learn
from stage_rl.types import Prompt, Rewards, Rollout


def train(recipe: Recipe, *, on_step: OnStep | None = None) -> Path:
    """Trains a recipe, or goes on with its run, and returns the run folder.

    `on_step` is called with the number of each step, from 0, and its line of metrics.jsonl; by the
    first of several processes alone. What it raises ends the run.

    Raises `Stopped` after Ctrl-C or SIGTERM, when the step is done and saved; a `StageError` for
    everything else that ends a run.
    """
    with init_distributed(pick_device(recipe.training.device, key="training.device")) as world:
        return train_on(recipe, world, on_step=on_step)


def train_on(recipe: Recipe, world: World, *, on_step: OnStep | None = None) -> Path:
    """`train` by one of the processes of a run; all of them call it."""
    prompts = recipe.prompts.build()
    check_prompts(recipe, prompts)
    if (evaluation := evaluation_of(recipe)) is not None:
        check_evaluation(evaluation)
    check_ranks(recipe, world, num_prompts=len(prompts))
    check_trackers(recipe.trackers)
    folder = world.broadcast_object(lambda: check_run(recipe))
    saved = world.broadcast_object(lambda: latest_checkpoint(folder.checkpoints))
    done = saved.state.step if saved else 0
    if done >= recipe.steps:
        # Nothing is written: the run may have more steps than this recipe asks for.
        schedule = recipe.optimizer.schedule
        note = f" (in a longer run the {schedule} schedule lowers the learning rate later)"
        with live_view(first=done, last=done, rank=world.rank) as view:
            view.say(
                f"{folder.path}: finished after {done} steps; raise steps to go on"
                f"{'' if schedule == 'constant' else note}"
            )
        return folder.path
    with live_view(first=done, last=recipe.steps, rank=world.rank) as view:
        # What can be wrong with a recipe shows here, before a folder says what is trained in it.
        base = saved.state.base if saved else ""
        trainer = build_trainer(recipe, prompts, world, say=view.say, recorded_base=base)
        with (
            open_run(recipe, world) as run,
            stop_signals() as signals,
            tracked(recipe, run.path, on_step, quiet=not world.first) as on_each,
        ):
            train_steps(trainer, run, signals, view=view, on_step=on_each)
    return run.path


def train_steps(
    trainer: Trainer,
    run: RunFolder,
    signals: Sequence[int],
    *,
    view: LiveView,
    on_step: OnStep | None = None,
) -> None:
    """All steps from the newest checkpoint on; `signals` fills while they run."""
    recipe, world = trainer.recipe, trainer.world
    saved = world.broadcast_object(lambda: latest_checkpoint(run.checkpoints))
    first = saved.state.step if saved else 0
    monitor = Monitor(recipe, saved.state if saved else None)
    busy = overcommitment(torch.get_num_threads() * world.size)
    if busy and trainer.policy.device.type == "cpu":
        view.say(busy)
    if saved:
        trainer.restore(saved)
    view.say(f"{run.path}: {f'goes on after step {first}' if saved else 'begins'}")
    codebook_VC = trainer.codebook() if recipe.run.log_images_every else None
    if world.first:
        run.forget_after(first)
        if codebook_VC is not None:
            run.log_codebook(codebook_VC.numpy())
    # A step of which nothing was learned is one in which a reward failed.
    failed = saved.state.counters.get("failed_reward_steps", 0) if saved else 0
    learned, kept = first > failed, first
    for step in range(first, recipe.steps):
        try:
            with traced(_trace_file(trainer, run, step)):
                result = train_step(trainer, step, signals)
        except RewardsPendingError:
            if world.size == 1 and step > kept:  # several processes save together or not at all
                trainer.save(run.checkpoints, monitor.state(step, trainer.base))
                kept = step
            lost = f"; what came after step {kept} is not saved" if step > kept else ""
            text = f"{run.path}: stopped in step {step + 1}, whose rewards did not come{lost}"
            raise Stopped(text, signal_number=signals[0]) from None
        except DivergedError as error:
            raise DivergedError(f"step {step + 1}: {error}") from error
        learned = learned or result.learned is not None
        monitor.update(trainer, result, view.say, signals)
        if world.first:
            numbers = record(trainer, run, result)
            view.show(step + 1, numbers)
            if on_step:
                on_step(step, numbers)
        monitor.raise_if_dead(result, view.say)
        every, done = recipe.run.save_every, step + 1
        stopped = world.any_of(signals[0] if signals else None)
        due = done == recipe.steps or (every and done % every == 0)
        if done == recipe.steps and not learned:
            why = result.rewards.reasons[0]
            raise RewardError(f"no step had a reward to learn from (at last: {why}); mend it")
        if stopped or due or monitor.is_best(done):
            trainer.save(run.checkpoints, monitor.state(done, trainer.base))
            kept = done
        if stopped:
            raise Stopped(
                f"{run.path}: stopped after step {done} and saved; run the same command "
                "again to go on",
                signal_number=stopped,
            )


def train_step(trainer: Trainer, step: int, signals: Sequence[int] = ()) -> Step:
    """One pass of the loop; a `RewardsPendingError` where a signal came and no rewards come."""
    recipe, world, timer = trainer.recipe, trainer.world, Timer()
    policy, precision = trainer.policy, trainer.precision

    # Sample: G images of every prompt, from copies of the weights as they are now.
    trainer.engine.reload()
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(step), step=step)
    stats = RolloutStats.of(trainer.engine.passes)
    timer.record("sample_s")
    fixed, logged = None, _is_due(recipe.run.log_images_every, step, recipe.steps)
    if logged:
        fixed = trainer.draw_fixed()
        timer.record("log_s")

    # Judge: on a thread of their own, so that the rewards hide behind the passes that measure.
    rollout, pending, numbers = judge(trainer, rollout, step=step, signals=signals)
    if recipe.rollout.resample_equal_groups:
        timer.record("resample_s")

    # Measure: log-probability and entropy of each token under the reference, then the policy.
    batches = trainer.batches(rollout)
    exact = recipe.algorithm.exact_kl
    reference_by_batch = measure_all(trainer.reference, batches, precision, with_states=exact)
    timer.record("reference_s")
    numbers |= untrained_mismatch(
        policy,
        batches[0],
        precision,
        sampling=trainer.sampling,
        num_images=recipe.probe.mismatch_images,
    )
    timer.record("mismatch_s")
    update = trainer.update(learning_rate(step, recipe.steps, recipe.optimizer))
    first = measure_to_learn(policy, batches[0], update, reference_by_batch[0])
    timer.record("learn_s")
    rewards = world.concat(result_of(pending, signals=signals))
    timer.record("judge_wait_s")

    # Credit the tokens and learn, micro-batch by micro-batch, from that same pass of the policy.
    learned = None
    if rewards.valid_P.any():
        learned = learn(
            policy,
            trainer.optimizer,
            batches,
            first=first,
            rewards=rewards,
            reference=reference_by_batch,
            update=update,
            record=timer.record,
        )
    timer.record("learn_s")

    reference = concat([replace(measured, states_NTW=None) for measured in reference_by_batch])
    numbers |= cut_metrics(rollout)
    if learned:
        numbers |= learning_metrics(learned, reference, world)
        numbers |= trained_mismatch(learned.measured, rollout, recipe.algorithm)
        numbers |= _rates(trainer, stats, timer, update, num_images=len(rollout.tokens_NT))
    if _is_due(recipe.probe.every, step, recipe.steps):
        numbers |= measure_drift(policy, trainer.reference, trainer.probe, precision)
        timer.record("probe_s")
    refresh_every = recipe.algorithm.reference_refresh_every
    if refresh_every and (step + 1) % refresh_every == 0:
        trainer.refresh_reference()

    numbers = over_ranks(world.gather(numbers))
    numbers |= reward_metrics(rewards) | {"optimizer/lr": update.rate}
    result = Step(step, rollout, rewards, reference, learned, numbers, timer, fixed)
    return result.of_all_ranks(world) if logged else result


def judge(
    trainer: Trainer, rollout: Rollout, *, step: int, signals: Sequence[int]
) -> tuple[Rollout, Future[Rewards], dict[str, float]]:
    """Hands a rollout to the rewards; returns it, their verdict to come, and metrics.

    Where groups of equal rewards are drawn again the verdict has come, and the rollout is another.
    """
    pending = trainer.rewards.submit(rollout)
    if not trainer.recipe.rollout.resample_equal_groups:
        return rollout, pending, {}
    rollout, rewards, numbers = resample(
        trainer,
        rollout,
        result_of(pending, signals=signals),
        step=step,
        score=lambda drawn: result_of(trainer.rewards.submit(drawn), signals=signals),
    )
    pending = Future()
    pending.set_result(rewards)
    return rollout, pending, numbers


def _rates(
    trainer: Trainer, stats: RolloutStats, timer: Timer, update: Update, *, num_images: int
) -> dict[str, float]:
    precision = trainer.precision
    return rates(
        DecoderSize.of(trainer.engine.decoder),
        stats,
        timer.timings,
        num_images=num_images,
        scoring=precision.scoring,
        num_updates=update.num_updates,
        peak_tflop_per_s=peak_bf16(trainer.policy.device) if precision.mixed else None,
    )


def record(trainer: Trainer, run: RunFolder, result: Step) -> dict[str, float]:
    """Writes a step into the run folder, the samples where they are due; returns its numbers."""
    recipe = trainer.recipe
    if result.learned and _is_due(recipe.run.log_images_every, result.number, recipe.steps):
        groups, rewards = recipe.run.log_groups, len(recipe.rewards)
        log_samples(run, result, result.learned, num_groups=groups, num_rewards=rewards)
        result.timer.record("log_s")
    numbers = result.numbers | result.timer.times()
    num_images = result.rewards.rewards_PG.numel()
    images_per_s = num_images / numbers["time/step_s"]
    numbers |= {
        "images_per_s": images_per_s,
        "tokens_per_s": images_per_s * result.rollout.tokens_NT.shape[1],
        "throughput/sample_images_per_s": num_images / numbers["time/sample_s"],
    }
    run.log_metrics(result.number, numbers)
    return numbers


def _trace_file(trainer: Trainer, run: RunFolder, step: int) -> Path | None:
    """Where the first process writes the trace of a step; None where the recipe wants none."""
    wanted = trainer.recipe.training.profile == step and trainer.world.first
    return run.path / "profile" / f"{step:06d}.json.gz" if wanted else None


def _is_due(every: int, step: int, num_steps: int) -> bool:
    """Whether something happens at a step: every so many steps and at the last one; 0: never."""
    return bool(every) and (step % every == 0 or step == num_steps - 1)


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
