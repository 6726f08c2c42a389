"""`stage bench reward-overlap`: how much of a slow reward the trainer hides behind its own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from stage_rl.bench.base import BenchResult, Setting, at_least
from stage_rl.bench.step import recipe_of
from stage_rl.errors import InputError
from stage_rl.recipe import Recipe
from stage_rl.rewards.base import Score
from stage_rl.rewards.judge import RewardFunctions, WeightedReward
from stage_rl.training.loop import train_step
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt

BAR = ">= 80 % of a reward as long as the reference pass"
LEAST_HIDDEN = 0.80


@dataclass
class SlowReward:
    """Scores by brightness after a wait, like a scorer on another device or machine."""

    seconds: float = 0.0
    took_s: float = 0.0
    """How long the last call was."""

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        started = time.perf_counter()
        means = images_NHWC.float().mean(dim=(1, 2, 3)) / 255
        time.sleep(self.seconds)
        scores = [Score(value, f"luminance {value:.2f}") for value in means.tolist()]
        self.took_s = time.perf_counter() - started
        return scores


def run(
    *,
    model: str = "shapes",
    num_prompts: int = 8,
    group_size: int = 8,
    guidance_scale: float = 3.0,
    dtype: str = "mixed",
    lengths: tuple[float, ...] = (0.5, 1.0, 2.0),
    rounds: int = 3,
    seed: int = 0,
) -> BenchResult:
    """Trains with a reward that waits, as long as the reference pass times each of `lengths`.

    Hidden is the part of the reward that the step does not wait for after the reference's pass and
    the policy's first. The reward only waits, so it stands for a scorer elsewhere: one on the same
    cores takes its share.
    """
    settings: dict[str, Setting] = dict(locals())
    at_least(1, num_prompts=num_prompts, rounds=rounds)
    at_least(2, group_size=group_size)
    at_least(0, seed=seed)
    if min(lengths) <= 0:
        raise InputError(f"--lengths: {min(lengths):g} is out of range; write numbers above 0")
    recipe = recipe_of(
        model,
        [
            f"rollout.prompts_per_step={num_prompts}",
            f"rollout.group_size={group_size}",
            f"rollout.guidance_scale={guidance_scale}",
            f"rollout.dtype={dtype}",
            f"training.dtype={dtype}",
            f"seed={seed}",
        ],
    )
    return measure(recipe, lengths=lengths, rounds=rounds, settings=settings)


def measure(
    recipe: Recipe, *, lengths: Sequence[float], rounds: int, settings: Mapping[str, Setting]
) -> BenchResult:
    """The benchmark for a recipe, whose rewards are replaced by the slow one."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    reward = SlowReward()
    trainer.rewards = RewardFunctions([WeightedReward("slow", 1.0, reward)])
    number = iter(range(2 + rounds * (1 + len(lengths))))

    def step(reward_s: float) -> dict[str, float]:
        reward.seconds = reward_s
        return train_step(trainer, next(number)).timer.times() | {"reward_s": reward.took_s}

    step(0.0)
    reference_s = step(0.0)["time/reference_s"]
    # Each round has every length once, so that a change of load falls on all of them.
    steps = [
        {length: step(length * reference_s) for length in (0.0, *lengths)} for _ in range(rounds)
    ]
    measures = {"reference_ms": reference_s * 1e3}
    for length in lengths:
        took_s, wait_s, longer_s = (
            statistics.median(values)
            for values in zip(*(_waits(row[length], row[0.0]) for row in steps), strict=True)
        )
        measures |= {
            f"reward_{length:g}x_ms": took_s * 1e3,
            f"wait_{length:g}x_ms": wait_s * 1e3,
            f"hidden_{length:g}x": 1 - wait_s / took_s,
            f"hidden_by_step_{length:g}x": 1 - longer_s / took_s,
        }
    return _result(measures, lengths, settings)


def _waits(slow: Mapping[str, float], plain: Mapping[str, float]) -> tuple[float, float, float]:
    """Seconds of the reward, of the wait for it, and by which the step was longer than without."""
    longer_s = slow["time/step_s"] - plain["time/step_s"]
    return slow["reward_s"], slow["time/judge_wait_s"], longer_s


def _result(
    measures: Mapping[str, float], lengths: Sequence[float], settings: Mapping[str, Setting]
) -> BenchResult:
    rows = [
        f"{length:>8g}x{measures[f'reward_{length:g}x_ms']:>12.1f}"
        f"{measures[f'wait_{length:g}x_ms']:>10.1f}{measures[f'hidden_{length:g}x']:>9.0%}"
        f"{measures[f'hidden_by_step_{length:g}x']:>14.0%}"
        for length in lengths
    ]
    head = f"{'reference':>9}{'reward ms':>12}{'wait ms':>10}{'hidden':>9}{'by step time':>14}"
    shown = 1.0 if 1.0 in lengths else lengths[0]
    hidden = measures[f"hidden_{shown:g}x"]
    return BenchResult(
        name="reward-overlap",
        headline=f"{hidden:.0%} of a reward of {measures[f'reward_{shown:g}x_ms']:.0f} ms is "
        f"hidden, the reference pass takes {measures['reference_ms']:.0f} ms",
        bar=BAR,
        reached=hidden >= LEAST_HIDDEN if shown == 1.0 else None,
        settings={**settings, "lengths": tuple(lengths)},
        measures=measures,
        table=(head, *rows),
    )
