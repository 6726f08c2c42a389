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

Report = Callable[[str], None]

FLOOR = 0.02
"""Share of its peak that the learning rate ends at."""


def train_stage(
    name: str,
    train_step: Callable[[int, float], str],
    *,
    steps: int,
    lr: float,
    warmup_steps: int,
    report: Report,
    show_every: int = 100,
    state_file: Path | None = None,
    save_every: int = 200,
    parts: Mapping[str, Any] | None = None,
) -> None:
    """Calls `train_step(step, learning rate)` step by step and reports the notes it returns.

    With a `state_file` the state of the `parts` is saved there, and an existing file is where the
    stage goes on.
    """
    schedule = OptimizerConfig(lr=lr, schedule="cosine", warmup_steps=warmup_steps)
    parts, first = parts or {}, 0
    if state_file is not None and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        first = state["step"]
        report(f"{name}: continues at step {first}")
    started, shown = time.monotonic(), first
    for step in range(first, steps):
        note = train_step(step, learning_rate(step, steps, schedule, floor=FLOOR))
        done = step + 1
        if done % show_every == 0:
            pace_s = (time.monotonic() - started) / (done - shown)
            left = f"{pace_s:.2f} s/step, {pace_s * (steps - done) / 60:.1f} min left"
            report(f"{name}: step {done}/{steps}, {left}, {note}")
            started, shown = time.monotonic(), done
        if state_file is not None and (done % save_every == 0 or done == steps):
            state = {"step": done, **{key: part.state_dict() for key, part in parts.items()}}
            replace_file(state_file, functools.partial(torch.save, state))
