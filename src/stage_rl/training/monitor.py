"""What watches over a run from step to step: signs of death, tripwires, held-out validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups, exact_kl, token_entropy
from stage_rl.errors import DivergedError
from stage_rl.evaluation.results import Setup
from stage_rl.evaluation.run import BENCHMARKS
from stage_rl.policies.base import Policy
from stage_rl.recipe import EvaluationConfig, LivenessConfig, Recipe, TripwiresConfig
from stage_rl.rollout.engine import Engine
from stage_rl.training.checkpoint import Progress
from stage_rl.training.trainer import Step, Trainer
from stage_rl.training.update import MicroBatch, Precision
from stage_rl.types import Rewards


class Watch:
    """The watch over a run, taken up where a checkpoint left it."""

    def __init__(self, recipe: Recipe, saved: Progress | None):
        counters = saved.signs if saved else {}
        self._evaluation = recipe.evaluation
        self._last = recipe.steps
        self._liveness = Liveness(recipe.liveness, counters)
        self._tripwires = Tripwires(recipe.tripwires, counters)
        self.best: Best | None = None
        if saved and saved.best_step is not None and saved.best_score is not None:
            self.best = Best(saved.best_step, saved.best_score)

    def look(self, trainer: Trainer, taken: Step, say: Callable[[str], None]) -> None:
        """Adds what it sees to a step's numbers: validation where it is due, tripwires passed."""
        self._validate(trainer, taken, say)
        taken.numbers.update(self._tripwires.count(taken.numbers, self.best))

    def _validate(self, trainer: Trainer, taken: Step, say: Callable[[str], None]) -> None:
        settings, done = self._evaluation, taken.number + 1
        if settings is None or not settings.every:
            return
        if done % settings.every and done != self._last:
            return
        trainer.engine.reload()
        numbers = score_validation(
            trainer.engine, settings, guidance_scale=trainer.sampling.guidance_scale
        )
        # Every rank draws the same images; the first one's score decides, on all.
        numbers = trainer.ranks.gather(numbers)[0]
        taken.numbers.update(numbers)
        taken.timer.record("validation_s")
        score = numbers["validation/score"]
        self.best = best_of(self.best, Best(done, score))
        place = "this one" if self.best.step == done else f"step {self.best.step}"
        say(f"held-out validation after step {done}: {score:.3f}, best so far: {place}")

    def check(self, taken: Step, say: Callable[[str], None]) -> None:
        """Raises DivergedError where the run is dead or a tripwire stops it, after the step is in
        the metrics; else says which wire tripped.
        """
        self._liveness.check(taken.rewards, taken.grad_norm)
        for line in self._tripwires.check():
            say(line)

    def is_best(self, done: int) -> bool:
        """Whether the policy after `done` steps is the best by validation."""
        return self.best is not None and self.best.step == done

    def state(self, done: int, base: str) -> Progress:
        """What a checkpoint after `done` steps keeps of the run."""
        return Progress(
            done,
            {**self._liveness.counters, **self._tripwires.counters},
            base,
            self.best.step if self.best else None,
            self.best.score if self.best else None,
        )


# Says when a run goes astray, and stops it where the recipe asks so.


PREFIX = "tripwires."

WORDS = {
    "entropy_gap": "the entropy is {value:.3g} nats from the reference's",
    "kl": "the KL from the reference is {value:.3g} nats a token",
    "grad_norm": "the gradient norm is {value:.3g}",
    "validation_drop": "held-out validation is {value:.3g} below its best",
}


class Tripwires:
    """Counts for how many steps in a row each number has been beyond its threshold."""

    def __init__(self, settings: TripwiresConfig, counters: Mapping[str, int] | None = None):
        self._settings = settings
        self._tripped: list[str] = []
        self.counters = {
            name: count for name, count in (counters or {}).items() if name.startswith(PREFIX)
        }

    def count(self, numbers: Mapping[str, float], best: Best | None) -> dict[str, float]:
        """Takes the metrics of a step into account; those of the wires that it is beyond.

        Validation counts the steps that it is scored at, and its first fall trips at once.
        """
        self._tripped = []
        beyond = {}
        for name, value in _watched(numbers, best).items():
            threshold = getattr(self._settings, name)
            if threshold is None:
                continue
            wire = PREFIX + name
            count = self.counters.get(wire, 0) + 1 if value > threshold else 0
            self.counters[wire] = count
            if count == (1 if name == "validation_drop" else self._settings.steps):
                self._tripped.append(self._says(name, value, threshold, best))
            if count:
                beyond[f"tripwires/{name}"] = float(count)
        return beyond

    def check(self) -> Sequence[str]:
        """What the last counted step tripped, each wire once until it was within its threshold
        again; where the recipe stops, a DivergedError with it.
        """
        if self._tripped and self._settings.action == "stop":
            raise DivergedError("; ".join(self._tripped))
        return self._tripped

    def _says(self, name: str, value: float, threshold: float, best: Best | None) -> str:
        held = "" if name == "validation_drop" else f" for {self._settings.steps} steps in a row"
        kept = f" (the best checkpoint is that of step {best.step})" if best else ""
        return (
            f"tripwire {name}: {WORDS[name].format(value=value)}, above {threshold:g}{held}{kept}; "
            f"lower optimizer.lr, raise algorithm.beta, or raise {PREFIX}{name}"
        )


def _watched(numbers: Mapping[str, float], best: Best | None) -> dict[str, float]:
    """The numbers by wire; one that the step does not have is left out, and its count stays."""
    watched = {
        "entropy_gap": abs(numbers["entropy/gap"]) if "entropy/gap" in numbers else None,
        "kl": numbers.get("kl/mean"),
        "grad_norm": numbers.get("grad/norm"),
        "validation_drop": best.score - numbers["validation/score"]
        if best and "validation/score" in numbers
        else None,
    }
    return {name: value for name, value in watched.items() if value is not None}


# Drift from the reference on a fixed set of its own samples.
#
# The entropy of a step's own samples moves with its prompts; on a fixed set it moves with the
# policy
# alone. The divergence is exact: the sum over the whole codebook at every token.
#
# Shape suffixes: N completions, T image tokens, R rows of a chunk, W width of a row, V codebook
# size.


@dataclass(frozen=True)
class Drift:
    """Means over all tokens of the probe set, nats."""

    kl: float
    """KL(policy || reference)."""
    entropy: float
    """Entropy of the policy minus that of the reference."""


@torch.no_grad()
def measure_drift(
    policy: Policy, reference: Policy, batch: MicroBatch, precision: Precision
) -> Drift:
    """How far the policy has moved, on samples of the reference, under the scored distribution."""

    def head(model: Policy, rows_RW: Tensor) -> Tensor:
        return precision.scoring.logits(model.head, rows_RW).float()

    with policy.gathered(), reference.gathered():
        states = [
            model.states(
                batch.prompts,
                batch.tokens_NT,
                group_size=batch.group_size,
                scoring=precision.scoring,
                mixed=precision.mixed,
            ).flatten(0, 1)
            for model in (policy, reference)
        ]
        kl, entropy = [], []
        for rows in zip(*(s.split(precision.logprob_rows) for s in states), strict=True):
            logits_RV, ref_logits_RV = head(policy, rows[0]), head(reference, rows[1])
            kl.append(exact_kl(logits_RV, ref_logits_RV))
            entropy.append(token_entropy(logits_RV) - token_entropy(ref_logits_RV))
    return Drift(torch.cat(kl).mean().item(), torch.cat(entropy).mean().item())


# Held-out validation: a benchmark in small, scored while a run trains, to keep its best policy.


@dataclass(frozen=True)
class Best:
    """The best validation of a run so far."""

    step: int
    """Steps done when it was scored: the number of its checkpoint."""
    score: float


def score_validation(
    engine: Engine, settings: EvaluationConfig, *, guidance_scale: float
) -> dict[str, float]:
    """Scores the weights of the engine's last reload: every measure's overall mean.

    validation/score is the measure that decides, the first one the benchmark prints by task.
    `guidance_scale` is that of the rollout, for an evaluation that names none.
    """
    own = settings.guidance_scale
    setup = Setup(
        settings.benchmark,
        settings.validation_images_per_task,
        guidance_scale if own is None else own,
        settings.validation_seed,
        engine.dtype,
    )
    benchmark = BENCHMARKS[settings.benchmark]
    results = benchmark.run(engine.policy, setup, name="validation", engine=engine)
    numbers = {f"validation/{name}": results.summary(name).overall.mean for name in results.scores}
    return numbers | {"validation/score": numbers[f"validation/{results.by_task[0]}"]}


def best_of(best: Best | None, new: Best) -> Best:
    """The better one of the best so far and a new validation; of equals, the earlier."""
    return new if best is None or new.score > best.score else best


class Liveness:
    """Stops a run that looks healthy but no longer learns: counts the signs of it, step by step."""

    def __init__(self, settings: LivenessConfig, counters: Mapping[str, int] | None = None) -> None:
        self._settings = settings
        self.counters: dict[str, int] = dict(counters or {})

    def check(self, judged: Rewards, grad_norm: float | None) -> None:
        """Takes a step into account; raises DivergedError when a sign has held for too long.

        `grad_norm` is None for a step that had nothing to learn from.
        """
        rewards_PG = judged.rewards_PG[judged.valid_P]
        equal = len(rewards_PG) > 0 and bool(equal_reward_groups(rewards_PG).all())
        signs = {
            "failed_reward_steps": (
                not judged.valid_P.all(),
                f"a reward failed on some group (at last: {_failure(judged)})",
            ),
            # One number for all images is the narrower sign: it is named first.
            "constant_reward_steps": (
                equal and bool(rewards_PG.max() == rewards_PG.min()),
                "every image had the same reward",
            ),
            "equal_reward_steps": (equal, "all rewards of every group were equal"),
            "zero_gradient_steps": (grad_norm == 0, "the gradient was exactly 0"),
        }
        for name, (seen, words) in signs.items():
            limit = getattr(self._settings, name)
            self.counters[name] = self.counters.get(name, 0) + 1 if seen else 0
            if limit and self.counters[name] >= limit:
                raise DivergedError(
                    f"for {limit} steps in a row {words}; mend the cause, or raise liveness.{name}"
                )


def _failure(judged: Rewards) -> str:
    """The reason of a group that left the step; empty where none did."""
    group_size = len(judged.reasons) // len(judged.valid_P)
    lost = (~judged.valid_P).nonzero().flatten().tolist()
    return judged.reasons[lost[0] * group_size] if lost else ""
