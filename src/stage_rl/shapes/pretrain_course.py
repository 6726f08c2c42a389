"""What the stages of pretraining share: the course of the rate, progress, states that survive."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every parameter of an optimizer the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the target and renames, so that a stop leaves the old or the new file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


class Progress:
    """Says every `every` steps how far a stage is, and at what pace."""

    def __init__(
        self, stage: str, steps: int, *, first: int, every: int, report: Callable[[str], None]
    ) -> None:
        self.stage, self.steps, self.every, self.report = stage, steps, every, report
        self._started, self._shown = time.monotonic(), first
        if first:
            report(f"{stage}: continues at step {first}")

    def show(self, done: int, note: str) -> None:
        """After step `done`; `note` says how good the stage is."""
        if done % self.every:
            return
        pace_s = (time.monotonic() - self._started) / (done - self._shown)
        left_min = pace_s * (self.steps - done) / 60
        self.report(
            f"{self.stage}: step {done}/{self.steps}, {pace_s:.2f} s/step, "
            f"{left_min:.1f} min left, {note}"
        )
        self._started, self._shown = time.monotonic(), done
