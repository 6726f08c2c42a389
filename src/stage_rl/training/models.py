"""A MODEL as the command line takes it: weights, or what a run has made of them."""

from __future__ import annotations

from pathlib import Path

import torch

from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.policies.base import Policy
from stage_rl.policies.config import JanusConfig
from stage_rl.training.checkpoint import (
    Checkpoint,
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    step_of,
)
from stage_rl.training.contents import base_digest


def load_policy(model: str, device: torch.device) -> Policy:
    """The policy behind a folder, a hub id, `shapes`, RUN (its newest checkpoint), RUN@STEP or
    RUN@best, its best one by the held-out panel.
    """
    found = find_run(model)
    if found is None:
        return JanusConfig(path=model).build(device)
    run, checkpoint = found
    policy = load_recipe(run / "recipe.json").policy.build(device)
    checkpoint.check_base(base_digest(policy.module))
    checkpoint.load_policy(policy.module)
    return policy


def find_run(model: str) -> tuple[Path, Checkpoint] | None:
    """The run folder that a MODEL names, and its checkpoint; None where it names plain weights."""
    run, step = Path(model), ""
    if "@" in model and not run.exists():  # a folder's name may hold an @ of its own
        name, _, step = model.rpartition("@")
        run = Path(name)
    if not (run / "recipe.json").exists():
        if step and run.is_dir():
            raise InputError(f"{model}: {run} is no run folder; write the folder without @{step}")
        return None
    return run, _checkpoint(model, run / "checkpoints", step)


def _checkpoint(model: str, root: Path, step: str) -> Checkpoint:
    """The checkpoint of a step, or the newest one where `step` is empty."""
    if not step:
        checkpoint = latest_checkpoint(root)
        if checkpoint is None:
            raise InputError(f"{model}: has no checkpoint yet; train it first")
        return checkpoint
    if step == "best":
        step = _best_step(model, root)
    steps = {str(step_of(folder)): folder for folder in checkpoints(root)}
    if step not in steps:
        known = ", ".join(sorted(steps, key=int)) or "none"
        raise InputError(f"{model}: no checkpoint of step {step}; the run has: {known}")
    return read_checkpoint(steps[step])


def _best_step(model: str, root: Path) -> str:
    newest = latest_checkpoint(root)
    if newest is None or newest.state.best_step is None:
        raise InputError(
            f"{model}: no held-out panel has chosen a best checkpoint; train with evaluation.every,"
            " or write RUN@STEP"
        )
    return str(newest.state.best_step)
