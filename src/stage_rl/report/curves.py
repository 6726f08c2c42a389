"""Curves of runs and studies: entropy and divergence, scores, and scores at equal divergence.

Shape suffixes: S steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from stage_rl.errors import InputError
from stage_rl.report.figures import COLOURS, Drawing
from stage_rl.report.series import (
    AXIS_LABELS,
    REFERENCE,
    SCORES,
    Array,
    Cell,
    check_names,
    frontier_curve,
    mean_frontier,
    over_seeds,
    read_cells,
)
from stage_rl.study.tables import DRIFT, KL

Row = list[Any]
"""Of the table beside a figure."""

WIDTH_IN, HEIGHT_IN = 2.2, 1.8
"""Of a panel."""
ENTRY_IN, LETTER_IN, LINE_IN = 0.55, 0.056, 0.15
"""Of a legend: the line and the gaps of an entry, what a letter takes, and the height of a line."""


def curves(inputs: Sequence[Path], *, window: int = 10, **chosen: Any) -> Drawing:
    """Entropy of policy and reference, entropy drift and KL against the step.

    Drift and KL are those of the probe where there is one. `window`: steps of the running mean of
    what every step measures; `chosen`: see `read_cells`.
    """
    cells = read_cells(inputs, **chosen)
    drift, divergence = (
        probe if any(cell.has(probe) for cell in cells) else other
        for probe, other in ((DRIFT, "entropy/gap"), (KL, "kl/mean"))
    )
    return _against_steps(cells, ["entropy/policy", drift, divergence], window)


def scores(
    inputs: Sequence[Path], *, metrics: Sequence[str] = (), window: int = 10, **chosen: Any
) -> Drawing:
    """Scores against the step, from those of the base where they are known.

    `metrics`: names as in metrics.jsonl; none: reward and held-out scores, as far as they are
    there. `window`, `chosen`: as for `curves`.
    """
    cells = read_cells(inputs, **chosen)
    runs = [run for cell in cells for some in cell.arms.values() for run in some]
    known = sorted({name for run in runs for name in run.series})
    check_names("--metric", metrics, known)
    found = [name for name in SCORES if name in known]
    if len(found) < 2 and "validation/score" in known:
        found.append("validation/score")
    return _against_steps(cells, list(metrics) or found, window)


def frontier(inputs: Sequence[Path], *, score: str = "validation/gold", **chosen: Any) -> Drawing:
    """A held-out score against the root of the exact KL: runs thin, and the mean of each arm as far
    as all its runs got, with its standard error. `chosen`: as for `curves`.
    """
    cells = [one for one in read_cells(inputs, **chosen) if one.has(score) and one.has(KL)]
    if not cells:
        raise InputError(
            f"frontier: no run has {score} and {KL}; train with evaluation.every and probe.every"
        )
    figure, (axes,) = _panels(1, len(cells))
    rows: list[Row] = [["cell", "arm", "seed", "root_kl", score, "standard_error", "runs"]]
    for cell, ax in zip(cells, axes, strict=True):
        for colour, (arm, runs) in zip(_colours(), cell.arms.items(), strict=False):
            curves = {r.seed: curve for r in runs if (curve := frontier_curve(r, score, cell.base))}
            drawn = _draw_frontier(ax, curves, colour)
            rows += [[cell.name, arm, *row] for row in drawn]
        ax.set_title(cell.name, loc="left")
        ax.set_xlabel(r"$\sqrt{\mathrm{exact\ KL}}$  ($\sqrt{\mathrm{nats\,/\,token}}$)")
        ax.set_ylabel(AXIS_LABELS.get(score, score))
    _add_legend(figure, cells)
    return Drawing(figure, rows)


def _against_steps(cells: Sequence[Cell], metrics: Sequence[str], window: int) -> Drawing:
    """A panel for each cell and metric: means over runs, with their standard errors as bands."""
    figure, axes = _panels(len(cells), len(metrics))
    rows: list[Row] = [["cell", "arm", "metric", "step", "mean", "standard_error", "runs"]]
    for cell, in_row in zip(cells, axes, strict=True):
        in_row[0].set_title(cell.name, loc="left")
        for metric, ax in zip(metrics, in_row, strict=True):
            if not cell.has(metric):
                ax.set_axis_off()
                continue
            for colour, (arm, runs) in zip(_colours(), cell.arms.items(), strict=False):
                lines = {metric: "-"} | ({REFERENCE: "--"} if metric == "entropy/policy" else {})
                for name, line in lines.items():
                    table = over_seeds(runs, name, window, base=cell.base.get(name))
                    if table:
                        steps, means, errors, _ = zip(*table, strict=True)
                        _draw_mean(ax, steps, means, errors, colour, line)
                    rows += [[cell.name, arm, name, *row] for row in table]
            ax.set(xlabel="Step", ylabel=AXIS_LABELS.get(metric, metric))
    if len(rows) == 1:
        raise InputError(f"no run has {' or '.join(metrics)} yet; train longer, or name others")
    has_reference = any(row[2] == REFERENCE for row in rows)
    _add_legend(figure, cells, {"reference": "--"} if has_reference else {})
    return Drawing(figure, rows)


def _draw_frontier(
    ax: Axes, curves: Mapping[int, tuple[Array, Array]], colour: Any
) -> Iterator[Row]:
    """The rows of each seed, its end as a dot, and of the mean."""
    for seed, (root_S, score_S) in curves.items():
        ax.plot(root_S, score_S, color=colour, lw=0.5, alpha=0.3)
        ax.plot(root_S[-1], score_S[-1], ".", color=colour, ms=3)
        for root, score in zip(root_S.tolist(), score_S.tolist(), strict=True):
            yield [seed, root, score, "", 1]
    if curves:
        grid, mean, error = mean_frontier(list(curves.values()))
        _draw_mean(ax, grid, mean, error, colour)
        for row in zip(grid.tolist(), mean.tolist(), error.tolist(), strict=True):
            yield ["mean", *row, len(curves)]


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(WIDTH_IN * columns, HEIGHT_IN * rows + 0.3))
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _draw_mean(ax: Axes, x: Any, mean: Any, error: Any, colour: Any, line: str = "-") -> None:
    """A line, with a band of one standard error on each side."""
    mean, error = np.asarray(mean), np.asarray(error)
    ax.plot(x, mean, line, color=colour, lw=0.7 if line == "--" else None)
    if error.any():
        ax.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, lw=0)


def _colours() -> Iterator[Any]:
    return itertools.cycle(COLOURS)


def _add_legend(
    figure: Figure, cells: Sequence[Cell], styles: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Arms by colour above the panels, then what line styles mean."""
    arms = list(dict.fromkeys(arm for cell in cells for arm in cell.arms))
    handles = [
        Line2D([], [], color=colour, label=arm)
        for colour, arm in zip(_colours(), arms, strict=False)
    ]
    handles += [Line2D([], [], color="0.4", ls=ls, label=name) for name, ls in styles.items()]
    if len(handles) > 1:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, int(figure.get_figwidth() / (ENTRY_IN + LETTER_IN * longest)))
        figure.legend(handles=handles, loc="outside upper center", ncols=columns)
        more_lines = math.ceil(len(handles) / columns) - 1
        figure.set_figheight(figure.get_figheight() + LINE_IN * more_lines)
