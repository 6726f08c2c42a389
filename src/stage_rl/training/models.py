"""A MODEL as the command line takes it: weights, or what a run has made of them."""

from __future__ import annotations

from pathlib import Path

import torch

from stage_rl.config import load_recipe
from stage_rl.errors import InputError
from stage_rl.policies.base import Policy
from stage_rl.policies.config import JanusConfig
from stage_rl.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
)


def load_policy(model: str, device: torch.device) -> Policy:
    """The policy behind a folder, a hub id, `shapes`, RUN (its newest checkpoint) or RUN@STEP."""
    name, _, step = model.partition("@")
    run = Path(name)
    if not (run / "recipe.json").exists():
        if step and run.is_dir():
            raise InputError(f"{model}: {name} is no run folder; write the folder without @{step}")
        return JanusConfig(path=model).build(device)
    root = run / "checkpoints"
    if step:
        steps = {str(int(path.name.removeprefix("step_"))): path for path in checkpoints(root)}
        if step not in steps:
            known = ", ".join(sorted(steps, key=int)) or "none"
            raise InputError(f"{model}: no checkpoint of step {step}; the run has: {known}")
        checkpoint = read_checkpoint(steps[step])
    else:
        checkpoint = latest_checkpoint(root)
        if checkpoint is None:
            raise InputError(f"{model}: has no checkpoint yet; train it first")
    policy = load_recipe(run / "recipe.json").policy.build(device)
    checkpoint.load_policy(policy.module)
    return policy
