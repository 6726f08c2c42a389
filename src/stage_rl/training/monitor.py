"""What watches over a run from step to step: held-out validation, tripwires, liveness checks,
drift from the reference.

Shape suffixes: P prompts, G group, T image tokens, R rows of a chunk, W width of a row,
V codebook size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage_rl.algorithm import equal_reward_groups, exact_kl, token_entropy
from stage_rl.errors import DivergedError
from stage_rl.evaluation.request import evaluation_of, recipe_request
from stage_rl.evaluation.results import OVERALL
from stage_rl.evaluation.run import run_suite
from stage_rl.policies.base import Policy
from stage_rl.recipe import EvaluationConfig, LivenessConfig, Recipe, TripwiresConfig
from stage_rl.rewards.threads import RewardsPendingError
from stage_rl.rollout.engine import Engine
from stage_rl.training.checkpoint import Progress
from stage_rl.training.measure import MicroBatch, Precision
from stage_rl.training.metrics import Step
from stage_rl.training.trainer import Trainer
from stage_rl.types import Rewards


@dataclass(frozen=True)
class Best:
    """The best held-out validation of a run so far."""

    step: int
    """Steps done when it was scored: the number of its checkpoint."""
    score: float


class Monitor:
    """The monitor of a run, taken up where a checkpoint left it."""

    def __init__(self, recipe: Recipe, saved: Progress | None):
        counters = saved.counters if saved else {}
        self._evaluation, self._last = evaluation_of(recipe), recipe.steps
        self._liveness = Liveness(recipe.liveness, counters)
        self._tripwires = Tripwires(recipe.tripwires, counters)
        self.best: Best | None = None
        before = saved.validation if saved else ""
        self._validation = validation_hash8(recipe) or before
        # Scores of other images or measures cannot be compared.
        if saved and saved.best_step is not None and before in ("", self._validation):
            assert saved.best_score is not None
            self.best = Best(saved.best_step, saved.best_score)

    def update(
        self,
        trainer: Trainer,
        result: Step,
        say: Callable[[str], None],
        signals: Sequence[int] = (),
    ) -> None:
        """Adds what it sees to a step's numbers: validation where it is due, tripwires passed.

        A validation whose rewards do not come after a signal is left out.
        """
        settings, done = self._evaluation, result.number + 1
        if settings and settings.every and (done % settings.every == 0 or done == self._last):
            engine = trainer.engine
            engine.reload()
            held = engine.cache_bytes
            try:
                numbers = validation_scores(engine, settings, signals=signals)
            except RewardsPendingError:
                numbers = {}
            if engine.cache_bytes > held:  # the other passes of a step need that memory
                engine.release()
            # Every rank draws the images; the first one's score decides, on all.
            numbers = trainer.world.gather(numbers)[0]
            result.numbers.update(numbers)
            result.timer.record("validation_s")
            say(f"held-out validation after step {done}: {self._judged(done, numbers)}")
        result.numbers.update(self._tripwires.count(result.numbers, self.best))

    def _judged(self, done: int, numbers: Mapping[str, float]) -> str:
        """Remembers the best of the validations; what is said of this one."""
        if not numbers:
            return "left out, its rewards did not come"
        score = numbers["validation/score"]
        if self.best is None or score > self.best.score:
            self.best = Best(done, score)
        place = "this one" if self.best.step == done else f"step {self.best.step}"
        return f"{score:.3f}, best so far: {place}"

    def raise_if_dead(self, result: Step, say: Callable[[str], None]) -> None:
        """Raises DivergedError where the run is dead or a tripwire stops it, after the step is in
        the metrics; else says which wire tripped.
        """
        self._liveness.check(result.rewards, result.learned and result.learned.grad_norm)
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
            self._validation,
        )


def validation_hash8(recipe: Recipe) -> str:
    """Eight hexadecimal digits for what decides the score of a validation; empty without one."""
    written, drawn = recipe.evaluation, evaluation_of(recipe)
    if written is None or drawn is None or not written.every:
        return ""
    left_out = {"every", "data", "seed", "images_per_task", "top_k"}
    values = written.model_dump(mode="json", exclude=left_out)
    values["guidance_scale"] = drawn.guidance_scale
    # Former versions drew as the family does, and had no such key.
    if drawn.top_k != recipe.policy.policy_class.default_top_k:
        values["top_k"] = drawn.top_k
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def validation_scores(
    engine: Engine, settings: EvaluationConfig, *, signals: Sequence[int] = ()
) -> dict[str, float]:
    """The benchmark in small with the weights of the engine's last reload: every measure's overall
    mean as validation/NAME.

    validation/score is the measure that decides, the first one the benchmark prints by task; its
    mean in each task is validation/NAME/TASK.
    After one of `signals` a reward that gives no answer is a `RewardsPendingError`.
    """
    request = recipe_request(settings, validation=True, dtype=engine.dtype)
    results = run_suite(
        engine.policy, settings.benchmark, request, engine=engine, silent=True, signals=signals
    )
    numbers = {f"validation/{name}": results.summary(name)[OVERALL].mean for name in results.scores}
    first = results.main_measure
    for task, score in results.summary(first).items():
        numbers["validation/score" if task == OVERALL else f"validation/{first}/{task}"] = (
            score.mean
        )
    return numbers


PREFIX = "tripwires."

MESSAGES = {
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

        A number that the step lacks leaves its count as it is. The first fall of the validation
        trips at once.
        """
        watched = {"kl": numbers.get("kl/mean"), "grad_norm": numbers.get("grad/norm")}
        if "entropy/gap" in numbers:
            watched["entropy_gap"] = abs(numbers["entropy/gap"])
        if best and "validation/score" in numbers:
            watched["validation_drop"] = best.score - numbers["validation/score"]
        self._tripped, beyond = [], {}
        for name, value in watched.items():
            threshold = getattr(self._settings, name)
            if threshold is None or value is None:
                continue
            count = self.counters.get(PREFIX + name, 0) + 1 if value > threshold else 0
            self.counters[PREFIX + name] = count
            if count == (1 if name == "validation_drop" else self._settings.steps):
                self._tripped.append(self._message(name, value, threshold, best))
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

    def _message(self, name: str, value: float, threshold: float, best: Best | None) -> str:
        held = "" if name == "validation_drop" else f" for {self._settings.steps} steps in a row"
        kept = f" (the best checkpoint is that of step {best.step})" if best else ""
        return (
            f"tripwire {name}: {MESSAGES[name].format(value=value)}, above {threshold:g}"
            f"{held}{kept}; lower optimizer.lr, raise algorithm.beta, or raise {PREFIX}{name}"
        )


class Liveness:
    """Stops a run that looks healthy but no longer learns: counts each fault's steps in a row."""

    def __init__(self, settings: LivenessConfig, counters: Mapping[str, int] | None = None) -> None:
        self._settings = settings
        self.counters: dict[str, int] = dict(counters or {})

    def check(self, rewards: Rewards, grad_norm: float | None) -> None:
        """Takes a step into account; raises DivergedError when a fault has lasted for too long.

        `grad_norm` is None for a step that had nothing to learn from.
        """
        rewards_PG = rewards.rewards_PG[rewards.valid_P]
        equal = len(rewards_PG) > 0 and bool(equal_reward_groups(rewards_PG).all())
        faults = {
            "failed_reward_steps": (
                not rewards.valid_P.all(),
                f"a reward failed on some group (at last: {_failure(rewards)})",
            ),
            # One number for all images is the narrower fault: it is named first.
            "constant_reward_steps": (
                equal and bool(rewards_PG.max() == rewards_PG.min()),
                "every image had the same reward",
            ),
            "equal_reward_steps": (equal, "all rewards of every group were equal"),
            "zero_gradient_steps": (grad_norm == 0, "the gradient was exactly 0"),
        }
        for name, (seen, message) in faults.items():
            limit = getattr(self._settings, name)
            self.counters[name] = self.counters.get(name, 0) + 1 if seen else 0
            if limit and self.counters[name] >= limit:
                raise DivergedError(
                    f"for {limit} steps in a row {message}; fix the cause, or raise liveness.{name}"
                )


def _failure(rewards: Rewards) -> str:
    """The reason of a group that was dropped from the step; empty where none was."""
    lost = (~rewards.valid_P).nonzero().flatten().tolist()
    return rewards.reasons[lost[0] * rewards.rewards_PG.shape[1]] if lost else ""


@torch.no_grad()
def measure_drift(
    policy: Policy, reference: Policy, batch: MicroBatch, precision: Precision
) -> dict[str, float]:
    """How far the policy has moved, on samples of the reference, under the scored distribution:
    probe/kl, KL(policy || reference), and probe/entropy_drift, in nats, means over all tokens.

    A step's own samples move with its prompts; these stay. The divergence is exact: the sum over
    the codebook at every token.
    """

    def logits(model: Policy, rows_RW: Tensor) -> Tensor:
        return precision.scoring.logits(model.head, rows_RW).float()

    kl, entropy = [], []
    with policy.unsharded(), reference.unsharded():
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
        for rows in zip(*(s.split(precision.logprob_rows) for s in states), strict=True):
            logits_RV, ref_logits_RV = logits(policy, rows[0]), logits(reference, rows[1])
            kl.append(exact_kl(logits_RV, ref_logits_RV))
            entropy.append(token_entropy(logits_RV) - token_entropy(ref_logits_RV))
    return {
        "probe/kl": torch.cat(kl).mean().item(),
        "probe/entropy_drift": torch.cat(entropy).mean().item(),
    }
