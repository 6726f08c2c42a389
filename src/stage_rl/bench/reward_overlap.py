"""`stage bench reward-overlap`: how much of a slow reward the trainer hides behind its own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from stage_rl.bench.base import BenchResult, Setting, at_least
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.rewards.base import Score
from stage_rl.rewards.judging import Judge, WeightedReward
from stage_rl.schema import Recipe
from stage_rl.training.loop import train_step
from stage_rl.training.setup import build_trainer
from stage_rl.types import Prompt

BAR = ">= 80 % of a reward as long as the reference pass"
LEAST_HIDDEN = 0.80
RECIPE = "shapes_geneval"


@dataclass
class SlowReward:
    """Scores by brightness after a wait, like a scorer on another device or machine."""

    seconds: float = 0.0
    took_s: list[float] = field(default_factory=list)
    """How long each call was."""

    def __call__(self, images_NHWC: Tensor, prompts: list[Prompt]) -> list[Score]:
        started = time.perf_counter()
        means = images_NHWC.float().mean(dim=(1, 2, 3)) / 255
        time.sleep(self.seconds)
        scores = [Score(value, f"luminance {value:.2f}") for value in means.tolist()]
        self.took_s.append(time.perf_counter() - started)
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

    Hidden is the part of the reward that the step does not wait for after the reference pass. The
    reward only waits, so it stands for a scorer elsewhere: one on the same cores takes its share.
    """
    at_least(1, num_prompts=num_prompts, rounds=rounds)
    at_least(2, group_size=group_size)
    at_least(0, seed=seed)
    if min(lengths) <= 0:
        raise InputError(f"--lengths: {min(lengths):g} is out of range; write numbers above 0")
    recipe = load_recipe(
        RECIPE,
        [
            f"policy.path={model}",
            f"rollout.prompts_per_step={num_prompts}",
            f"rollout.group_size={group_size}",
            f"rollout.guidance_scale={guidance_scale}",
            f"rollout.dtype={dtype}",
            f"training.dtype={dtype}",
            f"seed={seed}",
            # Rounds are alike: no picture, no probe, one learning rate.
            "run.log_images_every=0",
            "probe.every=0",
            "optimizer.schedule=constant",
        ],
    )
    settings: dict[str, Setting] = {
        "model": model,
        "num_prompts": num_prompts,
        "group_size": group_size,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        "rounds": rounds,
        "seed": seed,
    }
    return measure(recipe, lengths=lengths, rounds=rounds, settings=settings)


def measure(
    recipe: Recipe, *, lengths: Sequence[float], rounds: int, settings: Mapping[str, Setting]
) -> BenchResult:
    """The benchmark for a recipe, whose rewards are replaced by the slow one."""
    trainer = build_trainer(recipe, recipe.prompts.build())
    reward = SlowReward()
    trainer.judge = Judge([WeightedReward("slow", 1.0, reward)])
    number = iter(range(1 + rounds * (1 + len(lengths))))

    def step() -> Mapping[str, float]:
        return train_step(trainer, next(number)).clock.times()

    step()
    plain = _medians([step() for _ in range(rounds)])
    measures = {"reference_ms": plain["time/reference_s"] * 1e3}
    for length in lengths:
        reward.seconds = length * plain["time/reference_s"]
        reward.took_s.clear()
        slow = _medians([step() for _ in range(rounds)])
        took_s = statistics.median(reward.took_s)
        longer_s = slow["time/step_s"] - plain["time/step_s"]
        measures |= {
            f"reward_{length:g}x_ms": took_s * 1e3,
            f"wait_{length:g}x_ms": slow["time/judge_wait_s"] * 1e3,
            f"hidden_{length:g}x": 1 - slow["time/judge_wait_s"] / took_s,
            f"hidden_by_step_{length:g}x": 1 - longer_s / took_s,
        }
    return _result(measures, lengths, settings)


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = ("time/reference_s", "time/judge_wait_s", "time/step_s")
    return {name: statistics.median(times[name] for times in steps) for name in names}


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
