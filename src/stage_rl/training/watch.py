"""What watches over a run from step to step: signs of death, tripwires, the held-out panel."""

from __future__ import annotations

from collections.abc import Callable

from stage_rl.schema import Recipe
from stage_rl.training.checkpoint import TrainerState
from stage_rl.training.metrics import Liveness
from stage_rl.training.panel import Best, best_of, score_panel
from stage_rl.training.steps import Step
from stage_rl.training.trainer import Trainer
from stage_rl.training.tripwires import Tripwires


class Watch:
    """The watch over a run, taken up where a checkpoint left it."""

    def __init__(self, recipe: Recipe, saved: TrainerState | None):
        counters = saved.signs if saved else {}
        self._evaluation = recipe.evaluation
        self._last = recipe.steps
        self._liveness = Liveness(recipe.liveness, counters)
        self._tripwires = Tripwires(recipe.tripwires, counters)
        self.best: Best | None = None
        if saved and saved.best_step is not None and saved.best_score is not None:
            self.best = Best(saved.best_step, saved.best_score)

    def look(self, trainer: Trainer, taken: Step, say: Callable[[str], None]) -> None:
        """Adds what it sees to a step's numbers: the panel where it is due, tripwires passed."""
        self._score_panel(trainer, taken, say)
        taken.numbers.update(self._tripwires.count(taken.numbers, self.best))

    def _score_panel(self, trainer: Trainer, taken: Step, say: Callable[[str], None]) -> None:
        settings, done = self._evaluation, taken.number + 1
        if settings is None or not settings.every:
            return
        if done % settings.every and done != self._last:
            return
        trainer.engine.reload()
        numbers = score_panel(
            trainer.engine, settings, guidance_scale=trainer.sampling.guidance_scale
        )
        # Every rank draws the panel; the first one's score decides, on all.
        numbers = trainer.ranks.gather(numbers)[0]
        taken.numbers.update(numbers)
        taken.clock.lap("panel_s")
        score = numbers["panel/score"]
        self.best = best_of(self.best, Best(done, score))
        place = "this one" if self.best.step == done else f"step {self.best.step}"
        say(f"held-out panel after step {done}: {score:.3f}, best so far: {place}")

    def check(self, taken: Step, say: Callable[[str], None]) -> None:
        """Raises DivergedError where the run is dead or a tripwire stops it, after the step is in
        the metrics; else says which wire tripped.
        """
        self._liveness.check(taken.judged, taken.grad_norm)
        for line in self._tripwires.check():
            say(line)

    def is_best(self, done: int) -> bool:
        """Whether the policy after `done` steps is the best by the panel."""
        return self.best is not None and self.best.step == done

    def state(self, done: int, base: str) -> TrainerState:
        """What a checkpoint after `done` steps keeps of the run."""
        return TrainerState(
            done,
            {**self._liveness.counters, **self._tripwires.counters},
            base,
            self.best.step if self.best else None,
            self.best.score if self.best else None,
        )
