"""Runs a study: as many trainings side by side as there are processors or GPUs, until all are done.

Every training is a process of its own, one thread each on a CPU, one GPU each where there are some.
What it leaves is read into FOLDER/results.json, small enough to keep beside the code; the same
command goes on after any stop, and one training that fails does not end the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stage_rl.config import load_recipe
from stage_rl.console import progress, stop_signals
from stage_rl.distributed import pick_device
from stage_rl.errors import Stopped
from stage_rl.files import read_metrics, replace_text
from stage_rl.recipe import Recipe
from stage_rl.rollout.engine import Engine
from stage_rl.study.plan import RunKey, Study, StudyRun
from stage_rl.study.records import read_results
from stage_rl.study.tables import recorded_steps
from stage_rl.training.monitor import validation_scores

POLL_S = 1.0
SERIES = (
    "reward/mean",
    "reward/std",
    "reward/equal_groups",
    "entropy/policy",
    "entropy/gap",
    "kl/mean",
    "kl/weight",
    "mask/mean",
    "credit/ess",
    "credit/policy_weight",
    "entropy/advantage_share",
    "entropy/equal_groups_share",
    "entropy/equal_groups_advantage",
    "grad/norm",
    "probe/kl",
    "probe/entropy_drift",
)
"""Metrics kept of every step that has them; of the evaluations all are."""


def run_study(study: Study, folder: Path, *, jobs: int | None = None) -> dict[str, Any]:
    """Runs what is missing of a study and returns its results, which FOLDER/results.json holds.

    A run that finished in results.json is not repeated, even where its folder is gone; nor one that
    a study of `reuse` has.
    `jobs` None: one for each GPU, or for each processor. Raises `Stopped` after Ctrl-C or SIGTERM,
    when the trainings have saved.
    """
    runs = list(study.runs())
    known = _recorded(study, folder)
    waiting = [run for run in runs if not _finished(run, folder, known.get(run.key))]
    total = sum(_steps(run) for run in waiting)
    gpus = list(range(torch.cuda.device_count()))
    slots: list[int | None] = [*gpus] or [None] * (jobs or os.cpu_count() or 1)
    slots = [slots[index % len(slots)] for index in range(jobs or len(slots))]
    with stop_signals() as signals, progress(f"study {study.name}", total) as advance:
        results = collect(study, folder)
        results["base"] = _base_scores(study, runs, results["base"])
        _write(folder, results)
        reasons = {}
        for run, reason in _run_all(waiting, folder, slots, advance=advance, signals=signals):
            reasons[run.key] = reason
            _write(folder, collect(study, folder, reasons))
    if signals:
        raise Stopped(
            f"{folder}: stopped; run the same command again to go on", signal_number=signals[0]
        )
    return collect(study, folder, reasons)


def collect(
    study: Study, folder: Path, reasons: Mapping[RunKey, str] | None = None
) -> dict[str, Any]:
    """The results of the runs that there are; earlier ones whose folders are gone stay as they are
    in FOLDER/results.json.
    """
    known = _recorded(study, folder)
    for run in study.runs():
        metrics = run.folder(folder) / "metrics.jsonl"
        if metrics.exists():
            known[run.key] = _read(run, metrics, (reasons or {}).get(run.key, ""))
    return {
        "study": study.model_dump(mode="json"),
        "base": read_results(folder)["base"] if (folder / "results.json").exists() else {},
        "runs": [known[key] for key in sorted(known)],
    }


def read_series(metrics: Path) -> dict[str, tuple[list[int], list[float | None]]]:
    """metrics.jsonl as (steps that were done, values) by metric, six digits each."""
    series: dict[str, tuple[list[int], list[float | None]]] = {}
    for numbers in read_metrics(metrics):
        done = numbers.pop("step") + 1
        for name, value in numbers.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(done)
            values.append(None if value is None else float(f"{value:.6g}"))
    return series


def _write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, separators=(",", ":")).replace('{"cell"', '\n{"cell"')
    replace_text(folder / "results.json", text + "\n")


def _base_scores(
    study: Study, runs: Sequence[StudyRun], known: Mapping[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """What the validation of each cell says of the policy before the first step; drawn once for
    cells that differ in nothing that it sees.
    """
    found, drawn = dict(known), {}
    for cell in study.cells:
        if cell in found:
            continue
        first = next(run for run in runs if run.cell == cell)
        recipe = load_recipe(first.recipe, first.overrides)
        key = repr((recipe.policy, recipe.evaluation, recipe.rollout))
        if key not in drawn:
            drawn[key] = _score_base(recipe)
        found[cell] = drawn[key]
    return found


def _score_base(recipe: Recipe) -> dict[str, float]:
    if recipe.evaluation is None:
        return {}
    policy = recipe.policy.build(pick_device(recipe.training.device, key="training.device"))
    engine = Engine(policy, dtype=recipe.rollout.dtype, max_images=recipe.rollout.max_images)
    guidance_scale = recipe.guidance_scale
    return validation_scores(engine, recipe.evaluation, guidance_scale=guidance_scale)


def _run_all(
    waiting: Sequence[StudyRun],
    folder: Path,
    slots: list[int | None],
    *,
    advance: Any,
    signals: Sequence[int],
) -> Iterator[tuple[StudyRun, str]]:
    """Runs all, each slot one at a time; yields each that ended and why, if it failed."""
    queue, free = list(waiting), list(slots)
    running: list[tuple[StudyRun, subprocess.Popen[bytes], int | None, int]] = []
    told = 0  # signals that were passed on: a training that gets a second one does not save
    while running or (queue and not signals):
        while queue and free and not signals:
            run, slot = queue.pop(0), free.pop(0)
            running.append((run, _start(run, folder, slot), slot, _done_steps(run, folder)))
        time.sleep(POLL_S)
        if len(signals) > told:
            told = len(signals)
            for _, process, _, _ in running:
                process.terminate()
        still = []
        for run, process, slot, seen in running:
            code, done = process.poll(), _done_steps(run, folder)
            if done > seen:
                advance(done - seen)
            if code is None:
                still.append((run, process, slot, done))
                continue
            free.append(slot)
            failed = _last_line(_log(run, folder)) if code and not signals else ""
            if failed:
                print(f"{run}: {failed}", file=sys.stderr)
            yield run, failed
        running = still


def _start(run: StudyRun, folder: Path, gpu: int | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if gpu is None:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    place = run.folder(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    with _log(run, folder).open("ab") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "stage_rl"),
                *("train", run.recipe, *run.overrides, f"run.dir={place}"),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which tells the others
        )


def _log(run: StudyRun, folder: Path) -> Path:
    return run.folder(folder).with_suffix(".log")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"


def _recorded(study: Study, folder: Path) -> dict[RunKey, dict[str, Any]]:
    """The runs of FOLDER/results.json, if there is one, and what other studies have of the rest."""
    known = {(r["cell"], r["arm"], r["seed"]): r for r in _records(folder)}
    others = {
        (record["recipe"], *record["overrides"]): record
        for name in study.reuse
        for record in _records(folder.parent / name)
        if not record["failed"]
    }
    for run in study.runs():
        record = others.get((run.recipe, *run.overrides))
        if record and run.key not in known:
            known[run.key] = record | {"cell": run.cell, "arm": run.arm}
    return known


def _records(folder: Path) -> list[dict[str, Any]]:
    return read_results(folder)["runs"] if (folder / "results.json").exists() else []


def _finished(run: StudyRun, folder: Path, record: Mapping[str, Any] | None) -> bool:
    steps = _steps(run)
    if run.folder(folder).exists() or record is None:
        return _done_steps(run, folder) >= steps
    same = (record["recipe"], record["overrides"]) == (run.recipe, list(run.overrides))
    return same and not record["failed"] and recorded_steps(record) >= steps


def _steps(run: StudyRun) -> int:
    return load_recipe(run.recipe, run.overrides).steps


def _done_steps(run: StudyRun, folder: Path) -> int:
    metrics = run.folder(folder) / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _read(run: StudyRun, metrics: Path, failed: str) -> dict[str, Any]:
    """One run as plain values."""
    series = read_series(metrics)
    kept = {n: s for n, s in series.items() if n in SERIES or n.startswith("validation/")}
    return {
        "cell": run.cell,
        "arm": run.arm,
        "seed": run.seed,
        "recipe": run.recipe,
        "overrides": list(run.overrides),
        "steps": _steps(run),
        "failed": failed,
        "series": kept,
    }
