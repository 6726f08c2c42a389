"""The training loop: sample, judge, measure, credit, learn. Start reading here.

Deliberate differences from the released code of the paper are listed in docs/decisions.md; the
objective itself is in `stage_rl.algorithm`, equation by equation.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from stage_rl.errors import DivergedError, InputError, Stopped
from stage_rl.prompts import prompts_of_step
from stage_rl.rewards.judging import check_fields
from stage_rl.schema import Recipe
from stage_rl.training.batches import micro_batches
from stage_rl.training.checkpoint import TrainerState, latest_checkpoint
from stage_rl.training.console import live_view
from stage_rl.training.metrics import Liveness, learning_metrics, reward_metrics
from stage_rl.training.optim import learning_rate
from stage_rl.training.probe import measure_drift
from stage_rl.training.runs import RunFolder, check_run, open_run
from stage_rl.training.setup import Trainer, build_trainer
from stage_rl.training.update import learn, measure_all
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
    liveness = Liveness(recipe.liveness, saved.state.signs if saved else None)
    with live_view(first=first, last=recipe.steps) as view:
        if saved:
            trainer.restore(saved)
            view.say(f"{run.path}: goes on after step {first}")
        run.forget_after(first)
        for step in range(first, recipe.steps):
            numbers = train_step(trainer, run, liveness, step)
            run.log_metrics(step, numbers)
            view.show(step + 1, numbers)
            every, done = recipe.run.save_every, step + 1
            stopped = signals[0] if signals else None
            if stopped or done == recipe.steps or (every and done % every == 0):
                trainer.save(run.checkpoints, TrainerState(done, liveness.counters, trainer.base))
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


def train_step(trainer: Trainer, run: RunFolder, liveness: Liveness, step: int) -> dict[str, float]:
    """One pass of the loop; returns the step's metrics."""
    recipe, clock = trainer.recipe, Clock()
    prompts = prompts_of_step(
        trainer.prompts,
        step=step,
        prompts_per_step=recipe.rollout.prompts_per_step,
        seed=recipe.seed,
    )
    # Sample: G images of every prompt, from copies of the weights as they are now.
    trainer.engine.reload()
    rollout = trainer.sample(trainer.engine, prompts, step=step)
    clock.lap("sample_s")

    # Judge, while the reference measures.
    verdict = trainer.judge.submit(rollout)
    batches = list(
        micro_batches(rollout, recipe.training.groups_per_microbatch, trainer.policy.device)
    )
    reference = measure_all(trainer.reference, batches, trainer.precision)
    clock.lap("reference_s")
    judged = verdict.result()
    clock.lap("judge_wait_s")

    # Measure the policy, credit each token, learn: one pass where there is one update.
    numbers, learned = reward_metrics(judged), None
    rate = learning_rate(step, recipe.steps, recipe.optimizer)
    if judged.kept_P.any():
        learned = learn(
            trainer.policy,
            trainer.optimizer,
            batches,
            judged=judged,
            reference=reference,
            update=trainer.update(rate),
        )
        numbers |= learning_metrics(learned, reference, rollout)
    numbers["optimizer/lr"] = rate
    clock.lap("learn_s")
    if learned and trainer.is_logged(step):
        trainer.log_samples(run, step, rollout, judged, learned, reference)
        clock.lap("log_s")
    try:
        liveness.check(judged, learned.grad_norm if learned else None)
    except DivergedError:
        run.log_metrics(step, numbers | clock.laps)  # the step that shows why
        raise

    # Watch the drift from the reference on its own samples.
    if trainer.is_probed(step):
        drift = measure_drift(trainer.policy, trainer.reference, trainer.probe(), trainer.precision)
        numbers |= {"probe/kl": drift.kl, "probe/entropy_drift": drift.entropy}
        clock.lap("probe_s")
    refresh = recipe.algorithm.reference_refresh_every
    if refresh and (step + 1) % refresh == 0:
        trainer.refresh_reference()
    num_images = len(rollout.tokens_NT)
    numbers |= clock.laps | {"time/step_s": clock.total, "images_per_s": num_images / clock.total}
    return numbers


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Books the time since the last lap under time/NAME."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[f"time/{name}"] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._started


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM so that a step can end; a second one ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python lets only the main thread set handlers
        return

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
