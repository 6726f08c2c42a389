"""`stage bench gradient-signal`: how much the gradients of independent steps have in common.

Steps from one and the same policy share the direction that raises the reward; all else in their
gradients is chance. With a cosine c between two of them, (1 - c) / c steps must be averaged until
the common part is as large as the rest: a recipe of fewer steps learns chance.

Shape suffixes: S steps, D coordinates of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage_rl.bench.base import BenchResult, Group
from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.training.loop import train_step
from stage_rl.training.metrics import Step
from stage_rl.training.trainer import Trainer, build_trainer

BAR = "a cosine above 0 by two standard errors"
MAX_COORDINATES = 4_000_000
"""Of a gradient; of a larger one, every second, third and so on is kept."""


def run(*, recipe: str = "shapes_geneval", steps: Group = 16, overrides: str = "") -> BenchResult:
    """Takes the gradients of a recipe's first steps, all at the weights it begins with.

    `overrides` are settings as `stage train` takes them, with spaces between.
    """
    loaded = load_recipe(recipe, ["probe.every=0", "run.log_images_every=0", *overrides.split()])
    trainer = build_trainer(loaded, loaded.prompts.build())
    return result(torch.stack([step_gradient(trainer, step) for step in range(steps)]))


def result(gradients_SD: Tensor) -> BenchResult:
    """Cosines of the gradients as they are and as Adam scales them, and what follows from the
    plain one.
    """
    # Adam divides every coordinate by its root mean square.
    scaled_SD = gradients_SD / gradients_SD.square().mean(0).sqrt().clamp_min(1e-12)
    cosine, error = mean_cosine(gradients_SD)
    scaled, scaled_error = mean_cosine(scaled_SD)
    headline = f"cosine {cosine:+.4f} +- {error:.4f}, "
    headline += f"as Adam scales it {scaled:+.4f} +- {scaled_error:.4f}"
    if cosine > 0:
        headline += f", signal equals chance after {(1 - cosine) / cosine:.0f} steps"
    measures = {
        "plain_cosine": cosine,
        "plain_standard_error": error,
        "scaled_cosine": scaled,
        "scaled_standard_error": scaled_error,
    }
    return BenchResult(headline, cosine > 2 * error, measures)


def step_gradient(trainer: Trainer, step: int) -> Tensor:
    """The gradient of one training step, D; the policy and the optimizer stay as they are."""
    result: list[Tensor] = []

    def take(parameters: Sequence[torch.nn.Parameter]) -> None:
        stride = math.ceil(sum(p.numel() for p in parameters) / MAX_COORDINATES)
        kept = [p.grad.flatten()[::stride] for p in parameters if p.grad is not None]
        result.append(torch.cat(kept).float().cpu())

    without_update(trainer, step, take)
    if not result:
        raise InputError(f"step {step} had no group to learn from; see what the rewards say")
    return result[0]


def without_update(
    trainer: Trainer,
    step: int,
    look: Callable[[Sequence[torch.nn.Parameter]], None] = lambda parameters: None,
) -> Step:
    """One training step whose gradients `look` sees; policy and optimizer stay as they are."""

    def drop(optimizer: torch.optim.Optimizer, *_: object) -> None:
        look([p for group in optimizer.param_groups for p in group["params"]])
        optimizer.zero_grad(set_to_none=True)  # nothing is left to update with

    hook = trainer.optimizer.register_step_pre_hook(drop)
    try:
        return train_step(trainer, step)
    finally:
        hook.remove()


def mean_cosine(gradients_SD: Tensor) -> tuple[float, float]:
    """Mean cosine over all pairs of steps and its standard error."""
    unit_SD = gradients_SD / gradients_SD.norm(dim=1, keepdim=True)
    first, second = torch.triu_indices(len(unit_SD), len(unit_SD), offset=1)
    cosines = (unit_SD @ unit_SD.T)[first, second]
    error = cosines.std() / math.sqrt(len(cosines)) if len(cosines) > 1 else torch.tensor(math.inf)
    return cosines.mean().item(), error.item()
