"""`stage bench reward-overlap`: how much of a slow reward the trainer hides behind its own work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import count

from torch import Tensor

from stage_rl.bench.base import BenchResult, benchmark, columns, medians_in_turn
from stage_rl.bench.models import recipe_of
from stage_rl.errors import InputError
from stage_rl.rewards.base import Score
from stage_rl.rewards.judge import RewardFunctions, WeightedReward
from stage_rl.training.loop import train_step
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt

BAR = ">= 80 % of a reward as long as the reference pass"
LEAST_HIDDEN = 0.80


@benchmark(BAR, group_size=2)
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
    if min(lengths) <= 0:
        raise InputError(f"--lengths: {min(lengths):g} is out of range; write numbers above 0")
    recipe = recipe_of(
        model,
        [],
        num_prompts=num_prompts,
        group_size=group_size,
        guidance_scale=guidance_scale,
        dtype=dtype,
        seed=seed,
    )
    trainer = build_trainer(recipe, recipe.prompts.build())
    reward, number = SlowReward(), count()
    trainer.rewards = RewardFunctions([WeightedReward("slow", 1.0, reward)])

    def step(reward_s: float) -> dict[str, float]:
        reward.seconds = reward_s
        return train_step(trainer, next(number)).timer.times() | {"reward_s": reward.took_s}

    without = {"0": partial(step, 0.0)}
    reference_s = medians_in_turn(without, 1)["0"]["time/reference_s"]
    slow = {f"{length:g}": partial(step, length * reference_s) for length in lengths}
    return _result(medians_in_turn(without | slow, rounds), reference_s * 1e3)


def _result(seconds: dict[str, dict[str, float]], reference_ms: float) -> BenchResult:
    """From the times of steps by length of their reward; `0` is without one."""
    measures = {"reference_ms": reference_ms}
    rows: list[tuple[str, ...]] = [("reference", "reward ms", "wait ms", "hidden", "by step time")]
    plain_s = seconds["0"]["time/step_s"]
    for length, times in list(seconds.items())[1:]:
        took_s, wait_s = times["reward_s"], times["time/judge_wait_s"]
        hidden, by_step = 1 - wait_s / took_s, 1 - (times["time/step_s"] - plain_s) / took_s
        measures |= {
            f"reward_{length}x_ms": took_s * 1e3,
            f"wait_{length}x_ms": wait_s * 1e3,
            f"hidden_{length}x": hidden,
            f"hidden_by_step_{length}x": by_step,
        }
        milliseconds = (f"{took_s * 1e3:.1f}", f"{wait_s * 1e3:.1f}")
        rows.append((f"{length}x", *milliseconds, f"{hidden:.0%}", f"{by_step:.0%}"))
    shown = "1" if "1" in seconds else list(seconds)[1]
    hidden = measures[f"hidden_{shown}x"]
    return BenchResult(
        f"{hidden:.0%} of a reward of {measures[f'reward_{shown}x_ms']:.0f} ms is hidden, "
        f"the reference pass takes {reference_ms:.0f} ms",
        hidden >= LEAST_HIDDEN if shown == "1" else None,
        measures,
        columns(*rows),
    )


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
