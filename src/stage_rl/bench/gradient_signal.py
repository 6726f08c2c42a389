"""`stage bench gradient-signal`: how much the gradients of independent steps have in common.

Steps from one and the same policy share the direction that raises the reward; all else in their
gradients is chance. With a cosine c between two of them, (1 - c) / c steps must be averaged until
the common part is as large as the rest: a recipe of fewer steps learns chance.

Shape suffixes: S steps, D coordinates of the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stage_rl.bench.base import BenchResult, at_least
from stage_rl.config import load_recipe
from stage_rl.training.trainer import Trainer, build_trainer
from stage_rl.training.update import learn, measure_all, measure_to_learn

BAR = "a cosine above 0 by two standard errors"
MAX_COORDINATES = 4_000_000
"""Of a gradient; of a larger one, every second, third and so on is kept."""


def run(*, recipe: str = "shapes_geneval", steps: int = 16, overrides: str = "") -> BenchResult:
    """Takes the gradients of a recipe's first steps, all at the weights it begins with.

    `overrides` are settings as `stage train` takes them, with spaces between.
    """
    at_least(2, steps=steps)
    settings = {"recipe": recipe, "steps": steps, "overrides": overrides}
    loaded = load_recipe(recipe, overrides.split())
    trainer = build_trainer(loaded, loaded.prompts.build())
    gradients_SD = torch.stack([step_gradient(trainer, step) for step in range(steps)])
    measures: dict[str, float] = {}
    # Adam divides every coordinate by its root mean square.
    scaled_SD = gradients_SD / gradients_SD.square().mean(0).sqrt().clamp_min(1e-12)
    for name, values_SD in (("plain", gradients_SD), ("scaled", scaled_SD)):
        mean, error = mean_cosine(values_SD)
        measures |= {f"{name}_cosine": mean, f"{name}_standard_error": error}
    return BenchResult(
        name="gradient-signal",
        headline=headline(measures),
        bar=BAR,
        reached=measures["plain_cosine"] > 2 * measures["plain_standard_error"],
        settings=settings,
        measures=measures,
    )


def step_gradient(trainer: Trainer, step: int) -> Tensor:
    """The gradient of one step, D, with the policy left as it is."""
    rollout = trainer.sample(trainer.engine, trainer.prompts_of(step), step=step)
    rewards = trainer.rewards.score(rollout)
    batches = trainer.batches(rollout)
    reference = measure_all(trainer.reference, batches, trainer.precision)
    taken: list[Tensor] = []
    hook = trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: taken.append(_flat_gradient(optimizer))
    )
    update = trainer.update(rate=0.0)
    first = measure_to_learn(trainer.policy, batches[0], update)
    learn(
        trainer.policy,
        trainer.optimizer,
        batches,
        first=first,
        rewards=rewards,
        reference=reference,
        update=update,
    )
    hook.remove()
    return taken[0]


def _flat_gradient(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stride = math.ceil(sum(p.numel() for p in parameters) / MAX_COORDINATES)
    kept = [p.grad.flatten()[::stride] for p in parameters if p.grad is not None]
    return torch.cat(kept).float().cpu()


def mean_cosine(gradients_SD: Tensor) -> tuple[float, float]:
    """Mean cosine over all pairs of steps and its standard error."""
    unit_SD = gradients_SD / gradients_SD.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(unit_SD), len(unit_SD), offset=1)
    cosines = (unit_SD @ unit_SD.T)[first, second]
    error = cosines.std() / math.sqrt(len(cosines)) if len(cosines) > 1 else torch.tensor(math.inf)
    return cosines.mean().item(), error.item()


def headline(measures: dict[str, float]) -> str:
    """The cosines and what follows from the plain one, in words."""
    parts = [
        f"{what} {measures[f'{name}_cosine']:+.4f} +- {measures[f'{name}_standard_error']:.4f}"
        for name, what in (("plain", "cosine"), ("scaled", "as Adam scales it"))
    ]
    cosine = measures["plain_cosine"]
    if cosine > 0:
        parts.append(f"signal equals chance after {(1 - cosine) / cosine:.0f} steps")
    return ", ".join(parts)
