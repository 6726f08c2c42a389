"""`stage report`: one HTML file of runs and studies that needs nothing but a browser.

Curves are drawn by Plotly, whose script is in the file; what the page shows of images and token
maps are the bytes that the run folders hold. `page/` has the template, the style and the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from plotly.colors import diverging, sequential
from plotly.offline import get_plotlyjs

from stage_rl.errors import InputError
from stage_rl.report import run_page
from stage_rl.report.series import (
    AXIS_LABELS,
    Cell,
    frontier_curve,
    mean_frontier,
    read_cells,
)
from stage_rl.study.run import read_results
from stage_rl.study.tables import KL, RunResult, cell_tables

COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
"""Told apart with any kind of colour vision (Petroff 2021, arXiv 2107.02270)."""
MOST_BYTES = 20_000_000
"""Of a report; nearly 5 MB are Plotly's script."""
DATA_BYTES = 14_000_000
"""Of curves, images and token maps."""
CURVE_BYTES = 8_000_000
LEAST_POINTS = 50
"""Of a curve, however many there are."""
SCRIPT, STYLE = "report.js", "report.css"

PANELS = {
    "Reward": ("reward/",),
    "Held-out validation": ("validation/",),
    "Entropy": ("entropy/policy", "entropy/reference"),
    "Entropy drift": ("probe/entropy_drift", "entropy/gap"),
    "KL from the reference": ("probe/kl", "kl/mean"),
    "Gradient norm": ("grad/norm",),
    "Seconds": ("time/",),
    "Any metric": ("",),
}
"""The metrics of each panel, by how their names begin."""
ON_OTHER_SCALES = ("reward/std", "reward/equal_groups", "reward/failed_groups")
"""Metrics that only the last panel has."""
FIRST = ("reward/mean", "validation/gold", "validation/score", "time/step_s", "loss/total")
"""What a panel shows at first, where it has one of them."""


def report_page(inputs: Sequence[Path]) -> str:
    """The report of run folders and of studies' folders, as one HTML page.

    Raises InputError for a folder that is neither, for a run without a step, and for so many that
    the page would be too large even without images.
    """
    runs = [path for path in inputs if (path / "recipe.json").exists()]
    studies = [path for path in inputs if path not in runs]
    cells: list[tuple[Cell, dict[str, Any]]] = [(cell, {}) for cell in read_cells(runs)]
    tables = []
    for path in studies:
        own = read_cells([path])
        results = read_results(path)
        name = results["study"].get("name", path.name)
        cells += [(cell, {"first_step": 1, "study": name}) for cell in own]
        tables.append({"name": name, "cells": cell_tables(results)})
    curves, most_points = _curves_that_fit(cells)
    room = max(0, DATA_BYTES - len(_json(curves)))
    while True:
        shown = [
            _run(path, budget=room // len(runs)) | {"name": name}
            for path, name in zip(runs, unique_names(runs), strict=True)
        ]
        page = _page(shown, tables, curves, most_points)
        excess = len(page.encode()) - MOST_BYTES
        if excess < 0:
            return page
        if not room:
            raise InputError(
                f"{inputs[0]}: {len(inputs)} folders need {(excess + MOST_BYTES) / 1e6:.1f} MB "
                f"without images, and a report has {MOST_BYTES / 1e6:g} MB; name fewer runs"
            )
        room = max(0, room - excess - room // 4 - 1)


def _page(
    shown: Sequence[Mapping[str, Any]],
    tables: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
    most_points: int | None,
) -> str:
    """The page of runs, of the tables of studies, and of the curves of all."""
    data = {
        "cells": curves,
        "runs": shown,
        "colours": COLOURS,
        "scales": {"sequential": sequential.Cividis, "signed": diverging.RdBu_r},
    }
    names = [run["name"] for run in shown] + [study["name"] for study in tables]
    return (
        _environment()
        .get_template("report.html")
        .render(
            title=", ".join(names),
            runs=shown,
            studies=tables,
            cells=curves,
            most_points=most_points,
            differences=run_page.differences(shown),
            data=_as_script(data),
            plotly=Markup(get_plotlyjs()),
            script=_part(SCRIPT),
            style=_part(STYLE),
        )
    )


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for number in range(1, max(map(len, paths), default=0)):
        names = ["/".join(parts[-number:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _environment() -> Environment:
    loader = PackageLoader("stage_rl.report", "page")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _part(name: str) -> Markup:
    return Markup((Path(__file__).parent / "page" / name).read_text(encoding="utf-8"))


def _as_script(data: Mapping[str, Any]) -> Markup:
    """JSON that no text of a run can end."""
    return Markup(_json(data).replace("<", "\\u003c"))


def _json(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def _run(path: Path, *, budget: int) -> dict[str, Any]:
    """All that the page shows of a run but its curves."""
    if not (path / "metrics.jsonl").exists():
        raise InputError(f"{path}: has no step yet; train it first")
    images = run_page.logged_steps(path, budget=budget * 3 // 5)
    return {
        **run_page.about_run(path),
        "images": images,
        "grid": run_page.grid_of(path),
        "fixed": run_page.fixed_prompts(path, budget=budget // 5),
        "before_after": run_page.before_after(path, budget=budget // 5),
        "comparison": run_page.comparison(path),
    }


def _curves_that_fit(
    cells: Sequence[tuple[Cell, Mapping[str, Any]]],
) -> tuple[list[dict[str, Any]], int | None]:
    """The curves of cells, given with the options of `_curves`; and the most points of any, where
    `CURVE_BYTES` made them fewer.
    """
    curves = [_curves(cell, **options) for cell, options in cells]
    points = most = max((n for cell, _ in cells for n in _lengths(cell).values()), default=0)
    while (size := len(_json(curves))) > CURVE_BYTES and points > LEAST_POINTS:
        points = max(LEAST_POINTS, points * CURVE_BYTES * 9 // (10 * size))
        curves = [_curves(_thinned(cell, points), **options) for cell, options in cells]
    return curves, points if points < most else None


def _thinned(cell: Cell, points: int) -> Cell:
    """At most so many points of each curve: of all its runs the same ones, which have a mean."""
    every = {name: -(-length // points) for name, length in _lengths(cell).items()}

    def thinned(run: RunResult) -> RunResult:
        series = {
            name: (steps[:: every[name]], values[:: every[name]])
            for name, (steps, values) in run.series.items()
        }
        return replace(run, series=series)

    arms = {arm: [thinned(run) for run in runs] for arm, runs in cell.arms.items()}
    return replace(cell, arms=arms)


def _lengths(cell: Cell) -> dict[str, int]:
    """By metric, the points of the longest run."""
    lengths: dict[str, int] = {}
    for run in (run for runs in cell.arms.values() for run in runs):
        for name, (steps, _) in run.series.items():
            lengths[name] = max(lengths.get(name, 1), len(steps))
    return lengths


def _curves(cell: Cell, *, first_step: int = 0, study: str = "") -> dict[str, Any]:
    """The curves of a cell and the panels they are drawn in.

    `first_step`: the number of the first step, 0 in a run's files and 1 in a study, which counts
    steps that are done.
    """
    names = sorted({name for runs in cell.arms.values() for run in runs for name in run.series})
    names = [name for name in names if cell.has(name)]
    panels = []
    for title, starts in PANELS.items():
        own = [name for start in starts for name in names if name.startswith(start)]
        if "" not in starts:
            own = [name for name in own if name not in ON_OTHER_SCALES and name.count("/") == 1]
        if own:
            first = next((name for name in FIRST if name in own), own[0])
            panels.append({"title": title, "metrics": own, "first": first})
    return {
        "title": f"{study}, {cell.name}" if study else "",
        "labels": {name: AXIS_LABELS[name] for name in names if name in AXIS_LABELS},
        "panels": panels,
        "base": dict(cell.base),
        "curves": [
            {"name": arm, "runs": [_series(run, first_step - 1) for run in runs]}
            for arm, runs in cell.arms.items()
        ],
        "frontier": _frontier(cell),
    }


def _series(run: RunResult, shift: int) -> dict[str, Any]:
    """Every metric of a run; most are of all steps, which are written once."""
    steps = [step + shift for step in max((s for s, _ in run.series.values()), key=len, default=[])]
    metrics = {}
    for name, (own, values) in run.series.items():
        own = [step + shift for step in own]
        metrics[name] = [None if own == steps else own, values]
    return {"seed": run.seed, "steps": steps, "metrics": metrics}


def _frontier(cell: Cell) -> dict[str, Any]:
    """Scores against the root of the divergence, of each run and the mean of each arm."""
    scores = [f"validation/{name}" for name in ("gold", "score")]
    score = next((name for name in scores if cell.has(name)), "")
    if not score or not cell.has(KL):
        return {}
    arms = []
    for arm, runs in cell.arms.items():
        curves = {r.seed: curve for r in runs if (curve := frontier_curve(r, score, cell.base))}
        if not curves:
            continue
        grid, mean, error = mean_frontier(list(curves.values()))
        arms.append(
            {
                "name": arm,
                "runs": [_points(*curve) | {"seed": seed} for seed, curve in curves.items()],
                "mean": _points(grid, mean) | {"error": _rounded(error)},
            }
        )
    return {"score": AXIS_LABELS.get(score, score), "arms": arms}


def _points(x: Any, y: Any) -> dict[str, list[float]]:
    return {"x": _rounded(x), "y": _rounded(y)}


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.asarray(values).tolist()]
