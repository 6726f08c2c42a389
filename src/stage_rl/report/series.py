"""The series of runs and studies as figures and reports show them: cells, arms, means over seeds.

They come from metrics.jsonl of run folders, where runs that differ by their seed alone are one
curve, and from results.json of studies, where the runs of an arm are one.

Shape suffixes: R runs of a curve, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from stage_rl.config import flatten
from stage_rl.errors import InputError
from stage_rl.run_records import record_of
from stage_rl.settings import did_you_mean
from stage_rl.study.run import read_results, read_series
from stage_rl.study.statistics import at_divergence
from stage_rl.study.tables import DRIFT, KL, RunResult, runs_by_arm

Array = NDArray[np.float64]

REFERENCE = "entropy/reference"
SCORES = ("reward/mean", "validation/gold", "validation/structure", "validation/retention")
AXIS_LABELS = {
    "entropy/policy": "Entropy (nats / token)",
    DRIFT: "Entropy drift (nats / token)",
    "entropy/gap": "Entropy drift (nats / token)",
    KL: "Exact KL (nats / token)",
    "kl/mean": "Estimated KL (nats / token)",
    "reward/mean": "Training reward",
    "validation/gold": "Gold score, held out",
    "validation/structure": "Structure, held out",
    "validation/retention": "Retention, held out",
    "validation/score": "Score, held out",
}
"""Other metrics are labelled by their names."""


@dataclass(frozen=True)
class Cell:
    """The curves of one row of panels."""

    name: str
    """Of a cell of a study; empty for runs."""
    arms: Mapping[str, Sequence[RunResult]]
    base: Mapping[str, float]
    """Scores before the first step, where they are known."""

    def has(self, metric: str) -> bool:
        """Whether any run measured it."""
        return any(run.values(metric)[0] for runs in self.arms.values() for run in runs)


def read_cells(
    inputs: Sequence[Path],
    *,
    cell: str | None = None,
    arms: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> list[Cell]:
    """The cells of studies, and the runs that are named on their own as one cell.

    `cell`, `arms`: only these. `labels`: other names for the curves, in their order.
    Raises InputError for what is neither and for names that are not there.
    """
    cells, folders = [], []
    for path in inputs:
        if (path / "recipe.json").exists():
            folders.append(path)
        elif (path / "results.json").exists():
            results = read_results(path)
            cells += [
                Cell(name, found, results["base"].get(name, {}))
                for name in results["study"]["cells"]
                if (found := runs_by_arm(results, name))
            ]
        else:
            raise InputError(
                f"{path}: holds neither a run nor the results of a study; name a folder that does"
            )
    if folders:
        cells.append(Cell("", _by_recipe(folders), {}))
    if cell:
        check_names("--cell", [cell], [one.name for one in cells])
        cells = [one for one in cells if one.name == cell]
    known = list(dict.fromkeys(arm for one in cells for arm in one.arms))
    check_names("--arm", arms, known)
    shown = list(arms) or known
    if labels and not len(labels) == len(set(labels)) == len(shown):
        raise InputError(f"--label: {len(labels)} for {len(shown)} curves; write its own for each")
    names = dict(zip(shown, labels or shown, strict=True))
    return [
        replace(one, arms={names[arm]: one.arms.get(arm, ()) for arm in shown}) for one in cells
    ]


def check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{option}: unknown '{name}'; {did_you_mean(name, known)}")


def _by_recipe(folders: Sequence[Path]) -> dict[str, list[RunResult]]:
    """Runs whose recipes differ by the seed alone, under the recipe's name; where several recipes
    have one name, with the settings in which they differ from the first of them.
    """
    groups: list[tuple[Mapping[str, Any], list[RunResult]]] = []
    for folder in folders:
        # As text: a recipe that is loaded imports what it names.
        recipe = dict(flatten(record_of(folder / "recipe.json")))
        if not (folder / "metrics.jsonl").exists():
            raise InputError(f"{folder}: has no step yet; train it first")
        run = RunResult(recipe.get("seed", 0), "", read_series(folder / "metrics.jsonl"))
        for other, runs in groups:
            if not _differing(other, recipe):
                runs.append(run)
                break
        else:
            groups.append((recipe, [run]))
    named: dict[str, list[RunResult]] = {}
    for recipe, runs in groups:
        name = recipe.get("name", "")
        first = next(other for other, _ in groups if other.get("name", "") == name)
        settings = [f"{key}={recipe.get(key)}" for key in _differing(first, recipe)]
        named[" ".join([name, *settings])] = runs
    return named


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which recipes differ, but for the seed and where the runs are."""
    keys = [key for key in {**one, **other} if key != "seed" and not key.startswith("run.")]
    return [key for key in keys if (key in one, one.get(key)) != (key in other, other.get(key))]


def over_seeds(
    runs: Sequence[RunResult], metric: str, window: int, *, base: float | None
) -> list[tuple[int, float, float, int]]:
    """Step, mean, standard error (0 for one run) and number of runs, for each step of any run."""
    by_step: dict[int, list[float]] = {} if base is None else {0: [base]}
    is_every_step = not metric.startswith(("validation/", "probe/"))
    for run in runs:
        steps, values = _values(run, metric)
        if is_every_step and values:
            values = uniform_filter1d(values, window, mode="nearest").tolist()
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, []).append(value)
    if not any(by_step.keys() - {0}):
        return []
    return [
        (step, float(np.mean(values)), _standard_error(values), len(values))
        for step, values in sorted(by_step.items())
    ]


def _values(run: RunResult, metric: str) -> tuple[list[int], list[float]]:
    """Those of the run; the reference's entropy is the policy's without the gap."""
    if metric != REFERENCE or metric in run.series:
        return run.values(metric)
    gaps = dict(zip(*run.values("entropy/gap"), strict=True))
    pairs = zip(*run.values("entropy/policy"), strict=True)
    both = [(step, entropy - gaps[step]) for step, entropy in pairs if step in gaps]
    return [step for step, _ in both], [entropy for _, entropy in both]


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def frontier_curve(
    run: RunResult, score: str, base: Mapping[str, float]
) -> tuple[Array, Array] | None:
    """root_S of the divergence and score_S, from the base on where it is known; None without."""
    _, score_S, divergence_S = run.curve(score)
    if not divergence_S:
        return None
    if score in base:
        score_S, divergence_S = [base[score], *score_S], [0.0, *divergence_S]
    return np.sqrt(divergence_S), np.array(score_S)


def mean_frontier(
    curves: Sequence[tuple[Array, Array]], *, num_points: int = 51
) -> tuple[Array, Array, Array]:
    """Root of the divergence, mean score and standard error, where all runs were."""
    low = max(root_S[0] for root_S, _ in curves)
    high = min(root_S.max() for root_S, _ in curves)
    grid = np.linspace(low, max(low, high), num_points)
    grid = grid[:-1]  # the square of the last may round to above where a run got
    scores = [at_divergence(root_S**2, score_S, list(grid**2)) for root_S, score_S in curves]
    score_RS = np.array(scores, float)
    errors = [_standard_error(score_R) for score_R in score_RS.T.tolist()]
    return grid, score_RS.mean(0), np.array(errors)
