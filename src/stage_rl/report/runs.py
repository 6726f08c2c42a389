"""What run folders say of themselves: how far a run is, how it does, and why it ended.

It reads small files alone and loads no torch: a list of a hundred runs is there at once.
"""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.files import read_metrics
from stage_rl.run_records import record_of

RECENT_STEPS = 10
"""Steps that the newest values of a noisy metric are a mean of."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it."""

    folder: Path
    recipe: str
    """Name of the recipe, or its file."""
    overrides: tuple[str, ...]
    state: str
    """running, finished, stopped, failed; killed where a process ended without a word."""
    why: str
    num_steps: int
    """That it was asked for."""
    steps: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl, the last one of each step."""

    @property
    def seconds(self) -> float:
        """The time of all its steps."""
        return sum(step.get("time/step_s") or 0.0 for step in self.steps)

    @property
    def ended(self) -> bool:
        """Whether no process trains it."""
        return self.state != "running"

    def recent(self, metric: str) -> float | None:
        """Mean of a metric over the last steps; None where they lack it."""
        values = [step.get(metric) for step in self.steps[-RECENT_STEPS:]]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    def score(self) -> tuple[str, float] | None:
        """The measure that judges the run and its newest value: of the comparison after the last
        step, else of the held-out validation; None where there is neither.
        """
        for measure, rows in final_scores(self.folder).items():
            return measure, rows["trained"]["mean"]
        for step in reversed(self.steps):
            if step.get("validation/score") is not None:
                return "held out", step["validation/score"]
        return None


def read_run(folder: Path) -> Run:
    """A run by its folder; an `InputError` where it holds none."""
    recipe = record_of(folder / "recipe.json")
    if not recipe:
        raise InputError(f"{folder}: is not a run folder; name one that holds recipe.json")
    status = record_of(folder / "status.json")
    lines = read_metrics(folder / "metrics.jsonl")
    steps = tuple({numbers["step"]: numbers for numbers in lines}.values())
    state, why = status.get("state", ""), status.get("why", "")
    if _is_locked(folder / ".lock"):
        state, why = "running", ""
    elif state == "running":
        state, why = "killed", "it ended without a word: killed, or the machine went down"
    elif not state:  # of a former version
        state = "finished" if len(steps) >= recipe["steps"] else "stopped"
    return Run(
        folder,
        recipe=status.get("recipe") or recipe.get("name", ""),
        overrides=tuple(status.get("overrides", ())),
        state=state,
        why=why,
        num_steps=recipe["steps"],
        steps=steps,
    )


def find_runs(root: Path) -> list[Path]:
    """The folders of runs in a folder and below it, the one that was trained last first."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name one that holds runs")
    found = []
    for path, folders, files in os.walk(root):
        if "recipe.json" in files:
            found.append(Path(path))
            folders.clear()  # a run holds no other runs
    return sorted(found, key=_changed, reverse=True)


def final_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Of the comparison after the last step: base, trained and difference overall, by measure."""
    comparison = record_of(folder / "evaluation.json")
    if not comparison:
        return {}
    parts = {side: comparison[side]["summary"] for side in ("base", "trained")}
    parts["difference"] = comparison["difference"]
    return {
        measure: {part: rows[measure]["overall"] for part, rows in parts.items()}
        for measure in parts["trained"]
        if all("overall" in rows.get(measure, {}) for rows in parts.values())
    }


def _is_locked(file: Path) -> bool:
    """Whether a process trains the run."""
    if not file.is_file():
        return False
    with file.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _changed(folder: Path) -> float:
    file = folder / "metrics.jsonl"
    return (file if file.exists() else folder).stat().st_mtime
