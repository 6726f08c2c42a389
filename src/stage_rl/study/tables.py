"""The tables of a study, from its results.json alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage_rl.console import aligned
from stage_rl.errors import InputError
from stage_rl.study import statistics

LAST_SHARE = 0.2
"""Of the evaluations that the endpoint is the mean of."""
KL, DRIFT = "probe/kl", "probe/entropy_drift"
NOT_FINITE = re.compile(
    "loss is|gradient norm is|parameters that are not finite|logits (of the policy|that) are not"
)
"""Says in records of former versions that a run diverged."""


@dataclass(frozen=True)
class RunResult:
    """One run of results.json."""

    seed: int
    failed: str
    series: Mapping[str, tuple[list[int], list[float | None]]]
    diverged: bool = False
    """It has no end, and what it last scored is none."""

    def values(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it is finite."""
        steps, values = self.series.get(metric, ([], []))
        pairs = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        return [s for s, _ in pairs], [v for _, v in pairs]

    def at_end(self, metric: str) -> float | None:
        """Mean over the last fifth of what was measured."""
        _, values = self.values(metric)
        count = math.ceil(len(values) * LAST_SHARE)
        return float(np.mean(values[-count:])) if values else None

    def mean(self, metric: str) -> float | None:
        """Mean over all steps that have it."""
        _, values = self.values(metric)
        return float(np.mean(values)) if values else None

    def curve(self, metric: str) -> tuple[list[int], list[float], list[float]]:
        """A score where it was evaluated, and the divergence there, linear between its probes."""
        steps, scores = self.values(metric)
        probed, divergence = self.values(KL)
        return steps, scores, list(np.interp(steps, probed, divergence)) if probed else []

    def end(self, metric: str) -> statistics.End | None:
        """A score at the end, and the divergence there: means over the same evaluations."""
        _, scores, divergences = self.curve(metric)
        count = math.ceil(len(divergences) * LAST_SHARE)
        if not count:
            return None
        return statistics.End(*(float(np.mean(one[-count:])) for one in (divergences, scores)))

    def wander(self) -> float | None:
        """How much the entropy drift wanders beyond where it ends."""
        drift = self.values(DRIFT)[1]
        return statistics.fluctuation(drift) if drift else None

    @property
    def diverged_at(self) -> int | None:
        """The step that was not finite; None where that did not end the run."""
        steps = self.series.get("reward/mean", ([], []))[0]
        return max(steps, default=0) + 1 if self.diverged else None


Arms = Mapping[str, Sequence[RunResult]]
"""The runs of a cell by arm."""


@dataclass(frozen=True)
class CellTables:
    """What a study says of one cell."""

    name: str
    settings: str
    """Those that the cell adds to the recipe."""
    tables: Sequence[list[list[str]]]
    """Rows of cells, the first row names the columns."""
    unfinished: str
    """The runs that did not reach their end, and why; empty where there are none."""


def cell_tables(results: Mapping[str, Any]) -> list[CellTables]:
    """Every table of a study, cell by cell; cells without runs are left out."""
    study = results["study"]
    endpoint, pairs = study["endpoint"], study["contrasts"]
    found = []
    for cell in study["cells"]:
        arms = runs_by_arm(results, cell)
        if not arms:
            continue
        base = results["base"].get(cell, {}).get(endpoint)
        tables = (
            _ends(arms, endpoint, base),
            _tasks(arms, endpoint, results["base"].get(cell, {})),
            _entropy_reward(arms),
            _contrasts(arms, endpoint, pairs),
            _differences(arms, endpoint, [*pairs, *study.get("compared", ())]),
            *(_at_equal_divergence(arms, endpoint, pair) for pair in study.get("lines", ())),
        )
        settings = " ".join(study["cells"][cell])
        shown = [rows for rows in tables if rows]
        found.append(CellTables(cell, settings, shown, _unfinished(results, cell)))
    return found


def study_tables(results: Mapping[str, Any]) -> str:
    """Every table of a study as text, cell by cell."""
    parts = []
    for cell in cell_tables(results):
        parts.append(f"{results['study']['name']}, cell {cell.name}: {cell.settings}")
        parts += ["\n".join(aligned(rows)) for rows in cell.tables]
        parts.append(cell.unfinished)
    return "\n\n".join(part for part in parts if part)


def merge_results(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several studies as one: the endpoint, and a cell or an arm of the same name, must be the same
    in all of them, else it is an `InputError`; of runs that several have, the last counts.
    """
    merged: dict[str, Any] = {"study": {}, "base": {}, "runs": {}}
    same: dict[str, Any] = {}
    for part in parts:
        study, own = merged["study"], part["study"]
        for name, settings in _settings(own).items():
            if same.setdefault(name, settings) != settings:
                raise InputError(
                    f"{own['name']}: {name} is another than in {study['name']}; "
                    "show them one by one"
                )
        for key, value in own.items():
            if key in ("cells", "arms"):
                known = study.get(key, {})
                study[key] = {**known, **value, **known}
            elif key in ("contrasts", "compared", "lines"):
                new = [pair for pair in value if pair not in study.get(key, [])]
                study[key] = [*study.get(key, []), *new]
            else:
                study.setdefault(key, value)
        merged["base"] |= part["base"]
        merged["runs"] |= {(run["cell"], run["arm"], run["seed"]): run for run in part["runs"]}
    return merged | {"runs": list(merged["runs"].values())}


def _settings(study: Mapping[str, Any]) -> dict[str, Any]:
    """What makes runs of two studies the same: that of the endpoint, and of each cell and arm."""
    recipe, overrides = study.get("recipe"), study.get("overrides", [])
    arms = {
        f"arm {name}": (arm.get("recipe") or recipe, overrides, arm.get("overrides", []))
        for name, arm in study["arms"].items()
    }
    cells = {f"cell {name}": settings for name, settings in study["cells"].items()}
    return {"the endpoint": study["endpoint"], **cells, **arms}


def runs_by_arm(results: Mapping[str, Any], cell: str) -> dict[str, list[RunResult]]:
    """The runs of a cell, arm by arm, that finished or diverged; without arms that have none.

    A run that was stopped counts only in an arm without one of them, one that failed never.
    """
    arms: dict[str, list[RunResult]] = {}
    for arm in results["study"]["arms"]:
        runs = [run for run in results["runs"] if (run["cell"], run["arm"]) == (cell, arm)]
        ended = [run for run in runs if outcome(run) in ("finished", "diverged")]
        arms[arm] = [
            RunResult(run["seed"], run["failed"], run["series"], outcome(run) == "diverged")
            for run in ended or runs
            if outcome(run) != "failed"
        ]
    return {arm: runs for arm, runs in arms.items() if runs}


def outcome(record: Mapping[str, Any]) -> str:
    """How a run of results.json ended: finished, diverged, failed or unfinished."""
    failed, diverged = record["failed"], record.get("diverged")
    if failed and (diverged or (diverged is None and NOT_FINITE.search(failed))):
        return "diverged"
    if recorded_steps(record) >= record["steps"]:
        return "finished"
    return "failed" if failed else "unfinished"


def recorded_steps(record: Mapping[str, Any]) -> int:
    """Steps that a run of results.json did."""
    return max(record["series"].get("reward/mean", ([],))[0], default=0)


def _unfinished(results: Mapping[str, Any], cell: str) -> str:
    """The runs of a cell that did not reach their end."""
    parts = []
    for word in ("unfinished", "failed", "diverged"):
        runs = [
            f"{run['arm']}/{run['seed']} after {recorded_steps(run)} of {run['steps']} steps"
            + (f" ({run['failed']})" if run["failed"] else "")
            for run in results["runs"]
            if run["cell"] == cell and outcome(run) == word
        ]
        if runs:
            parts.append(f"{word}: {', '.join(runs)}")
    return "; ".join(parts)


Measure = Callable[[RunResult], "float | None"]

OUTCOMES: dict[str, Measure] = {
    "structure": lambda run: run.at_end("validation/structure"),
    "retention": lambda run: run.at_end("validation/retention"),
    "transfer": lambda run: run.at_end("validation/transfer"),
    "reward": lambda run: run.at_end("reward/mean"),
    "K": lambda run: run.at_end(KL),
    "drift": lambda run: run.at_end(DRIFT),
    "wander": RunResult.wander,
}
"""What a run ends with besides the endpoint, by its column."""


def _ends(arms: Arms, endpoint: str, base: float | None) -> list[list[str]]:
    """Where each arm ends: mean +- standard error over seeds, and how many diverged before."""
    rows = [["arm", "seeds", endpoint.rpartition("/")[2], "95 % interval", *OUTCOMES, "broke"]]
    for arm, runs in arms.items():
        found = _values(runs, lambda run: run.at_end(endpoint))
        score = statistics.estimate(list(found.values())) if found else None
        cells = [_mean(_values(runs, measure).values()) for measure in OUTCOMES.values()]
        broke = _broke(runs, endpoint, base)
        diverged = sum(run.diverged for run in runs)
        seeds = f"{len(runs) - diverged}" + (f" ({diverged} diverged)" if diverged else "")
        rows.append([arm, seeds, _cell(score), _interval(score), *cells, broke])
    return rows


def _tasks(arms: Arms, endpoint: str, base: Mapping[str, float]) -> list[list[str]]:
    """The endpoint task by task, as the paper's tables have it."""
    prefix = f"{endpoint}/"
    names = [name for runs in arms.values() for run in runs for name in run.series]
    names = [name for name in dict.fromkeys(names) if name.startswith(prefix)]
    if not names:
        return []
    rows = [["by task", *(name.removeprefix(prefix) for name in names), "overall"]]
    if base:
        rows.append(["base", *(f"{base[name]:.3f}" for name in [*names, endpoint] if name in base)])
    for arm, runs in arms.items():
        ends = [
            _values(runs, lambda run, name=name: run.at_end(name)) for name in [*names, endpoint]
        ]
        rows.append([arm, *(_mean(values.values()) for values in ends)])
    return rows


ENTROPY_REWARD = {
    "of the advantages": "entropy/advantage_share",
    "groups of equal rewards": "reward/equal_groups",
    "of the advantages there": "entropy/equal_groups_share",
    "mean |advantage| there": "entropy/equal_groups_advantage",
}
"""What the differences of entropy make, by column: means over all steps of a run."""


def _entropy_reward(arms: Arms) -> list[list[str]]:
    """What the entropy reward does, in the arms that have one."""
    rows = [["entropy reward", *ENTROPY_REWARD]]
    for arm, runs in arms.items():
        if any("entropy/advantage_share" in run.series for run in runs):
            means = (
                _values(runs, lambda run, name=name: run.mean(name))
                for name in ENTROPY_REWARD.values()
            )
            rows.append([arm, *(_mean(values.values(), count=True) for values in means)])
    return rows if len(rows) > 1 else []


def _contrasts(arms: Arms, endpoint: str, pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Paired differences by seed, with exact sign-flip p and Holm's correction over the pairs."""
    found = dict(_paired(arms, pairs, lambda run: run.at_end(endpoint)))
    if not found:
        return []
    p_values = [statistics.sign_flip_p(differences) for differences in found.values()]
    rows = [["difference", "pairs", "mean", "95 % interval", "p", "p (Holm)"]]
    for (name, differences), p, corrected in zip(
        found.items(), p_values, statistics.holm(p_values), strict=True
    ):
        score = statistics.estimate(differences)
        interval = _interval(score, signed=True)
        cells = [_cell(score, signed=True), interval, f"{p:.4f}", f"{corrected:.4f}"]
        rows.append([name, str(score.num_seeds), *cells])
    return rows


def _differences(arms: Arms, endpoint: str, pairs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Paired differences of all that a run ends with, each with its interval; no p."""

    def drift(run: RunResult) -> float | None:
        end = run.at_end(DRIFT)
        return None if end is None else abs(end)

    measures = {endpoint.rpartition("/")[2]: lambda run: run.at_end(endpoint), **OUTCOMES}
    measures |= {"drift": drift}
    del measures["reward"]
    columns = {name: dict(_paired(arms, pairs, measure)) for name, measure in measures.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [["difference", *("|drift|" if name == "drift" else name for name in columns)]]
    for name in names:
        cells = []
        for column in columns.values():
            score = statistics.estimate(column[name]) if name in column else None
            interval = "" if score is None or not score.interval else _interval(score, signed=True)
            mean = "" if score is None else f"{score.mean:+.3f}"
            cells.append(f"{mean} {interval}".strip())
        rows.append([name, *cells])
    return rows if names else []


def _paired(
    arms: Arms, pairs: Sequence[Sequence[str]], measure: Measure
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Of each pair of arms that have runs: its name, and the differences by seed."""
    for new, old in pairs:
        if new in arms and old in arms:
            ends = (_values(arms[arm], measure) for arm in (new, old))
            seeds, differences = statistics.paired(*ends)
            if seeds:
                yield f"{new} - {old}", differences


def _values(runs: Sequence[RunResult], measure: Measure) -> dict[int, float]:
    """By seed, of the runs that have it; what was measured before a run diverged is no end of it,
    or an arm would gain by diverging.
    """
    found = {run.seed: measure(run) for run in runs if not run.diverged}
    return {seed: value for seed, value in found.items() if value is not None}


def _at_equal_divergence(arms: Arms, endpoint: str, pair: Sequence[str]) -> list[list[str]]:
    """How far the other arms end above the line through the ends of a pair, by seed, and how many
    of them end between the two; no p.
    """
    ends = {arm: _last(runs, endpoint) for arm, runs in arms.items()}
    if not ends.keys() >= {*pair}:
        return []
    one, other = (ends.pop(arm) for arm in pair)
    head = f"above the line {' - '.join(pair)}"
    rows = [[head, "seeds", "between", "mean", "95 % interval"]]
    for arm, own in ends.items():
        seeds = sorted(own.keys() & one.keys() & other.keys())
        found = [statistics.above_line(own[seed], one[seed], other[seed]) for seed in seeds]
        above = [value for value in found if value is not None]
        if above:
            score = statistics.estimate(above)
            between = sum(statistics.is_between(own[s], one[s], other[s]) for s in seeds)
            cells = [str(between), _cell(score, signed=True), _interval(score, signed=True)]
            rows.append([arm, str(len(above)), *cells])
    return rows if len(rows) > 1 else []


def _last(runs: Sequence[RunResult], endpoint: str) -> dict[int, statistics.End]:
    """By seed where it ends; see `_values`."""
    found = {run.seed: run.end(endpoint) for run in runs if not run.diverged}
    return {seed: end for seed, end in found.items() if end is not None}


def _broke(runs: Sequence[RunResult], endpoint: str, base: float | None) -> str:
    if base is None:
        return ""
    steps = []
    for run in runs:
        evaluated, scores, divergences = run.curve(endpoint)
        if divergences or run.diverged_at:
            steps.append(
                statistics.breakdown_step(
                    evaluated[: len(divergences)],
                    scores,
                    divergences,
                    base=base,
                    diverged_at=run.diverged_at,
                )
            )
    return f"{sum(step is not None for step in steps)}/{len(steps)}"


def _mean(values: Any, *, count: bool = False) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return ""
    number = f" ({len(found)})" if count else ""
    return f"{_cell(statistics.estimate(found, draws=0))}{number}" if found else ""


def _cell(score: statistics.Estimate | None, *, signed: bool = False) -> str:
    if score is None:
        return ""
    error = "" if score.standard_error is None else f" +- {score.standard_error:.3f}"
    return f"{score.mean:+.3f}{error}" if signed else f"{score.mean:.3f}{error}"


def _interval(score: statistics.Estimate | None, *, signed: bool = False) -> str:
    if score is None or score.interval is None:
        return "not known"
    form = "[{:+.3f}, {:+.3f}]" if signed else "[{:.3f}, {:.3f}]"
    return form.format(*score.interval)
