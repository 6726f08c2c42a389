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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from stage_rl.config import diff_recipes, load_recipe
from stage_rl.console import progress, stop_signals
from stage_rl.distributed import pick_device, release_unused
from stage_rl.errors import DivergedError, InputError, Stopped
from stage_rl.evaluation.request import evaluation_of
from stage_rl.files import read_metrics, replace_text
from stage_rl.openmp import num_cores
from stage_rl.recipe import Recipe
from stage_rl.run_records import record_of
from stage_rl.study.plan import RunKey, Study, StudyRun
from stage_rl.study.records import read_results
from stage_rl.study.tables import recorded_steps
from stage_rl.training.monitor import validation_scores
from stage_rl.training.trainer import build_engine

POLL_S = 1.0
MOST_IN_VAIN = 2
"""Trainings in a row that fail on a GPU before their first step, until it gets no more."""
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
    when the trainings have saved, and `InputError` where a run was made with other settings.
    """
    _refuse_changed(study, folder)
    runs = list(study.runs())
    known = _recorded(study, folder)
    waiting = [run for run in runs if not _finished(run, folder, known.get(run.key))]
    total = sum(_steps(run) for run in waiting)
    slots: list[str | None] = [*_gpus()] or [None] * (jobs or num_cores())
    slots = [slots[index % len(slots)] for index in range(jobs or len(slots))]
    with stop_signals() as signals, progress(f"study {study.name}", total) as advance:
        results = collect(study, folder)
        results["base"] = _base_scores(study, folder)
        _write(folder, results)
        reasons: dict[RunKey, str] = {}
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
    in FOLDER/results.json. `reasons`: why runs failed that were started since, empty for the rest.
    """
    known, reasons = _recorded(study, folder), reasons or {}
    for run in study.runs():
        before: dict[str, Any] = known.get(run.key, {})
        failed = reasons[run.key] if run.key in reasons else before.get("failed", "")
        if (run.folder(folder) / "metrics.jsonl").exists() or (failed and not before):
            known[run.key] = _read(run, folder, failed)
        elif before:
            known[run.key] = before | {"failed": failed}
    return {
        "study": study.model_dump(mode="json"),
        "base": _results(folder)["base"],
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


def _base_scores(study: Study, folder: Path) -> dict[str, dict[str, float]]:
    """What the validation of each cell says of the policy before the first step; drawn once for
    cells that differ in nothing that it sees, and again where the study file has changed that.
    Like runs it is taken over from a study of `reuse`.
    """
    before = _results(folder)
    found, seen = dict(before["base"]), _seen_before(before)
    drawn: dict[str, dict[str, float]] = {}
    for other in (_results(folder.parent / name) for name in study.reuse):
        there = _seen_before(other)
        drawn |= {
            _validated(there[cell]): other["base"][cell]
            for cell in there.keys() & other["base"].keys()
        }
    for cell, recipe in _seen_by_validation(study).items():
        key = _validated(recipe)
        if cell in found and (cell not in seen or _validated(seen[cell]) == key):
            continue
        if key not in drawn:
            drawn[key] = _score_base(recipe)
            release_unused()  # the first GPU is a training's
        found[cell] = drawn[key]
    return found


def _seen_before(results: dict[str, Any]) -> dict[str, Recipe]:
    """By cell what the validation of a base saw; empty where that cannot be read any more."""
    try:
        return _seen_by_validation(Study.model_validate(results["study"]))
    except (ValidationError, InputError):  # of a former version, or there is none
        return {}


def _seen_by_validation(study: Study) -> dict[str, Recipe]:
    """By cell the recipe of its first run."""
    first: dict[str, StudyRun] = {}
    for run in study.runs():
        first.setdefault(run.cell, run)
    return {cell: load_recipe(run.recipe, run.overrides) for cell, run in first.items()}


def _validated(recipe: Recipe) -> str:
    """What of a recipe the validation of its base depends on."""
    return repr((recipe.policy, recipe.evaluation, recipe.rollout))


def _score_base(recipe: Recipe) -> dict[str, float]:
    evaluation = evaluation_of(recipe)
    if evaluation is None:
        return {}
    policy = recipe.policy.build(pick_device(recipe.training.device, key="training.device"))
    return validation_scores(build_engine(policy, recipe), evaluation)


@dataclass
class _Training:
    """A run that is under way."""

    run: StudyRun
    process: subprocess.Popen[bytes]
    slot: str | None
    """Its GPU; None: a processor."""
    first: int
    """Steps that were done when it started."""
    done: int


class _Slots:
    """The GPUs, or as None the processors, that no training has. A GPU on which trainings fail one
    after the other before their first step waits until no other is busy, or it would try them all.
    """

    def __init__(self, slots: Sequence[str | None]) -> None:
        self.free = list(slots)
        self._waiting: list[str | None] = []
        self._in_vain = Counter[str | None]()

    def any(self, *, idle: bool) -> bool:
        """Whether there is one; `idle`: nothing runs."""
        if not self.free and idle:
            self.free, self._waiting = self._waiting, []
            self._in_vain.clear()
        return bool(self.free)

    def give_back(self, slot: str | None, *, in_vain: bool) -> None:
        """Takes it back from a training that failed before its first step, or did not."""
        self.free.append(slot)
        self._in_vain[slot] = self._in_vain[slot] + 1 if in_vain else 0
        if slot is not None and self._in_vain[slot] >= MOST_IN_VAIN:
            self._waiting += [one for one in self.free if one == slot]
            self.free = [one for one in self.free if one != slot]
            text = "its last trainings failed before their first step; it waits for the others"
            print(f"GPU {slot}: {text}", file=sys.stderr)


def _run_all(
    waiting: Sequence[StudyRun],
    folder: Path,
    slots: list[str | None],
    *,
    advance: Any,
    signals: Sequence[int],
) -> Iterator[tuple[StudyRun, str]]:
    """Runs all, each slot one at a time; yields each when it starts, with no word, and when it
    ended, with why if it failed.
    """
    queue, places = list(waiting), _Slots(slots)
    threads = max(num_cores() // len(slots), 1)
    running: list[_Training] = []
    told = 0  # signals that were passed on: a training that gets a second one does not save
    while running or (queue and not signals):
        while queue and not signals and places.any(idle=not running):
            run, slot = queue.pop(0), places.free.pop(0)
            done = _done_steps(run, folder)
            running.append(_Training(run, _start(run, folder, slot, threads), slot, done, done))
            yield run, ""
        time.sleep(POLL_S)
        if len(signals) > told:
            told = len(signals)
            for training in running:
                training.process.terminate()
        for training in list(running):
            code, done = training.process.poll(), _done_steps(training.run, folder)
            if done > training.done:
                advance(done - training.done)
                training.done = done
            if code is None:
                continue
            running.remove(training)
            failed = _why(code, _log(training.run, folder)) if code and not signals else ""
            if failed:
                print(f"{training.run}: {failed}", file=sys.stderr)
            places.give_back(training.slot, in_vain=bool(failed) and done == training.first)
            yield training.run, failed


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: those that this process may use."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [one.strip() for one in named.split(",")][:count] if named else [*map(str, range(count))]


def _start(run: StudyRun, folder: Path, gpu: str | None, threads: int) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    if gpu is None:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
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


def _why(code: int, log: Path) -> str:
    """Why a training failed; the log of one that was killed ends anywhere."""
    if code < 0:
        return f"killed by signal {-code}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"


def _recorded(study: Study, folder: Path) -> dict[RunKey, dict[str, Any]]:
    """The runs of FOLDER/results.json, if there is one, and what other studies have of the rest."""
    known = {(r["cell"], r["arm"], r["seed"]): r for r in _results(folder)["runs"]}
    for run, (_, record) in _reused(study, folder).items():
        if run.key not in known:
            known[run.key] = record | {"cell": run.cell, "arm": run.arm}
    return known


def _reused(study: Study, folder: Path) -> dict[StudyRun, tuple[Path, dict[str, Any]]]:
    """Of the runs that studies of `reuse` have: the run's folder there, and its record."""
    found = {}
    for other in (folder.parent / name for name in study.reuse):
        for record in _results(other)["runs"]:
            if not record["failed"]:
                place = other / "runs" / record["cell"] / record["arm"] / str(record["seed"])
                found[_asked(record)] = (place, record)
    return {run: found[asked] for run in study.runs() if (asked := _asked(run._asdict())) in found}


def _asked(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Recipe and overrides of a run."""
    return (record.get("recipe", ""), *record.get("overrides", ()))


def _results(folder: Path) -> dict[str, Any]:
    """FOLDER/results.json, empty where there is none."""
    if (folder / "results.json").exists():
        return read_results(folder)
    return {"study": {}, "base": {}, "runs": []}


def _refuse_changed(study: Study, folder: Path) -> None:
    """An InputError where a run was made with other settings than the study has now: its numbers
    would stand under settings that they were not made with.
    """
    known = {(r["cell"], r["arm"], r["seed"]): r for r in _results(folder)["runs"]}
    reused = _reused(study, folder)
    for run in study.runs():
        places = [(run.folder(folder), known.get(run.key))]
        if run in reused and run.key not in known:
            places.append(reused[run])
        for place, record in places:
            if differing := _differing(run, place, record):
                raise InputError(
                    f"{place}: was made with other settings than {run} of {study.name} has now "
                    f"(differs in {', '.join(differing)}); write the former settings, or give the "
                    "arm another name, or the study another folder"
                )


def _differing(run: StudyRun, place: Path, record: Mapping[str, Any] | None) -> list[str]:
    """The keys of a recipe in which a run was made otherwise, by its folder or else its record."""
    recipe = load_recipe(run.recipe, run.overrides)
    done = record if record and recorded_steps(record) else None
    same = done is None or _asked(done) == _asked(run._asdict())
    try:
        if (place / "metrics.jsonl").exists() and (place / "recipe.json").exists():
            before = load_recipe(place / "recipe.json")
        elif same:
            return []
        else:
            source, *overrides = _asked(done or {})
            before = load_recipe(source, overrides)
    except InputError:  # of a former version
        return [] if same else ["recipe or overrides"]
    return [
        key
        for key in diff_recipes(before, recipe)
        if not recipe.may_change(key) or key.partition(".")[0] in ("steps", "evaluation")
    ]


def _finished(run: StudyRun, folder: Path, record: Mapping[str, Any] | None) -> bool:
    steps = _steps(run)
    if run.folder(folder).exists() or record is None:
        return _done_steps(run, folder) >= steps
    return not record["failed"] and recorded_steps(record) >= steps


def _steps(run: StudyRun) -> int:
    return load_recipe(run.recipe, run.overrides).steps


def _done_steps(run: StudyRun, folder: Path) -> int:
    metrics = run.folder(folder) / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _read(run: StudyRun, folder: Path, failed: str) -> dict[str, Any]:
    """One run as plain values."""
    place = run.folder(folder)
    status = record_of(place / "status.json")
    failed = "" if status.get("state") == "finished" else failed
    diverged = {"diverged": status["error"] == DivergedError.__name__} if "error" in status else {}
    series = read_series(place / "metrics.jsonl")
    return {
        "cell": run.cell,
        "arm": run.arm,
        "seed": run.seed,
        "recipe": run.recipe,
        "overrides": list(run.overrides),
        "steps": _steps(run),
        "failed": failed,
        **(diverged if failed else {}),
        "series": {n: s for n, s in series.items() if n in SERIES or n.startswith("validation/")},
    }
