"""What the stages of pretraining share: learning rate, progress, a state that survives a stop."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stage_rl.files import replace_file
from stage_rl.recipe import OptimizerConfig
from stage_rl.training.optim import learning_rate

FLOOR = 0.02
"""Share of its peak that the learning rate ends at."""

SHOW_EVERY, SAVE_EVERY = 50, 200


def train_stage(
    state_file: Path,
    parts: Mapping[str, Any],
    train_step: Callable[[int, float], str],
    *,
    steps: int,
    lr: float,
    warmup_steps: int,
) -> None:
    """Calls `train_step(step, learning rate)` step by step and prints the notes it returns.

    The state of the `parts` is saved in `state_file`; an existing one is where the stage goes on.
    """
    schedule = OptimizerConfig(lr=lr, schedule="cosine", warmup_steps=warmup_steps)
    name, first = state_file.stem, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first = state["step"]
        print(f"{name}: continues at step {first}", flush=True)
    started, shown = time.monotonic(), first
    for step in range(first, steps):
        note = train_step(step, learning_rate(step, steps, schedule, floor=FLOOR))
        done = step + 1
        if done % SHOW_EVERY == 0:
            pace_s = (time.monotonic() - started) / (done - shown)
            left = f"{pace_s:.2f} s/step, {pace_s * (steps - done) / 60:.1f} min left"
            print(f"{name}: step {done}/{steps}, {left}, {note}", flush=True)
            started, shown = time.monotonic(), done
        if done % SAVE_EVERY == 0 or done == steps:
            state = {"step": done, **{key: part.state_dict() for key, part in parts.items()}}
            replace_file(state_file, functools.partial(torch.save, state))
