"""Runs side by side as text: in what they differ, their courses, their final scores."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_rl.config import flatten
from stage_rl.console import aligned
from stage_rl.errors import InputError
from stage_rl.report.runs import Run, final_scores, read_run
from stage_rl.run_records import record_of

COURSES = (
    *("reward/mean", "validation/score", "entropy/gap", "kl/mean", "probe/kl", "grad/norm"),
    "time/step_s",
)
NUM_SPANS = 5
"""Parts that the steps of the longest run are divided into."""


def compare(folders: Sequence[Path]) -> str:
    """The tables of some runs; an `InputError` for a folder that is none, or one without a step."""
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.steps:
            raise InputError(f"{run.folder}: has no step yet; train it first")
    tables = [_about(runs), _settings(runs), _courses(runs), _scores(runs)]
    shown = (aligned(rows) for rows in tables if len(rows) > 1)
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in shown)


def _head(title: str, runs: Sequence[Run]) -> list[str]:
    return [title, *(chr(ord("A") + number) for number in range(len(runs)))]


def _about(runs: Sequence[Run]) -> list[list[str]]:
    """The letters that the runs have in the other tables."""
    return [
        ["run", "", "steps", "state"],
        *(
            [letter, str(run.folder), f"{len(run.steps)}/{run.num_steps}", run.state]
            for letter, run in zip(_head("", runs)[1:], runs, strict=True)
        ),
    ]


def _settings(runs: Sequence[Run]) -> list[list[str]]:
    """The settings in which any two differ, but for where the runs are."""
    settings = [dict(flatten(record_of(run.folder / "recipe.json"))) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one if key != "run.dir")
    rows = [[key, *(_setting(one.get(key)) for one in settings)] for key in keys]
    return [_head("setting", runs), *(row for row in rows if len(set(row[1:])) > 1)]


def _setting(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _courses(runs: Sequence[Run]) -> list[list[str]]:
    """The means of each metric over spans of steps, which are the same for all runs."""
    last = max(run.steps[-1]["step"] for run in runs) + 1
    edges = sorted({round(part * last / NUM_SPANS) for part in range(NUM_SPANS + 1)})
    rows = [_head("metric, steps", runs)]
    for metric in COURSES:
        for first, end in itertools.pairwise(edges):
            cells = [_mean(run, metric, first, end) for run in runs]
            if any(cell is not None for cell in cells):
                rows.append([f"{metric}, {first + 1} to {end}", *map(_number, cells)])
    return rows


def _mean(run: Run, metric: str, first: int, end: int) -> float | None:
    found = [step.get(metric) for step in run.steps if first <= step["step"] < end]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _scores(runs: Sequence[Run]) -> list[list[str]]:
    """Final scores, and how much each is above the base with its 95 % interval."""
    scores = [final_scores(run.folder) for run in runs]
    rows = [_head("final score, gain over base", runs)]
    for measure in dict.fromkeys(measure for one in scores for measure in one):
        rows.append([measure, *(_score(one.get(measure)) for one in scores)])
    return rows


def _score(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    change, interval = found["difference"], found["difference"].get("interval")
    span = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    return f"{found['trained']['mean']:.3f}  {change['mean']:+.3f}{span}"
