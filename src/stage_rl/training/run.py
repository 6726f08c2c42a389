"""The run folder: recipe, environment, metrics, images with reasons, arrays for a report."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from stage_rl.config import diff_recipes, load_recipe, resolved_json, run_folder, written_out
from stage_rl.distributed import SINGLE, World, environment
from stage_rl.errors import InputError, StageError, Stopped
from stage_rl.files import open_lock, replace_file, replace_text, writing
from stage_rl.recipe import Recipe
from stage_rl.training.checkpoint import checkpoints


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes. Open it with `open_run`, which also locks it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a step's numbers; what is not finite is written as null."""
        numbers = {k: v if np.isfinite(v) else None for k, v in values.items()}
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run does again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) < step]
        replace_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def log_images(
        self, step: int, image: Any, records: list[dict[str, Any]], *, folder: str = "images"
    ) -> None:
        """Writes FOLDER/STEP.png (a PIL image), and STEP.json with what is known of each image."""
        path = self.path / folder / f"{step:06d}.png"
        replace_file(path, image.save)
        replace_text(path.with_suffix(".json"), json.dumps(records, indent=1))

    def log_codebook(self, codes_VC: np.ndarray) -> None:
        """Writes codebook.npy, half precision, unless it is there; tokens never change meaning."""
        path = self.path / "codebook.npy"
        if not path.exists():
            replace_file(path, lambda file: np.save(file, codes_VC.astype(np.float16)))

    def log_arrays(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes samples/STEP.npz."""
        path = self.path / "samples" / f"{step:06d}.npz"
        replace_file(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


@contextlib.contextmanager
def open_run(recipe: Recipe, world: World = SINGLE) -> Iterator[RunFolder]:
    """The folder of a recipe, made or taken up, and locked while it is open; all ranks call it,
    the first one writes.

    Raises what `check_run` raises. Open it when nothing can be wrong with the recipe any more.
    """
    with contextlib.ExitStack() as opened:
        run = world.broadcast_object(lambda: opened.enter_context(_made(recipe, world.size)))
        if not run.path.is_dir():
            raise InputError(
                f"{run.path}: was made by the first process and is not seen by process "
                f"{world.rank}; give a run.dir on storage that all machines share"
            )
        yield run


@contextlib.contextmanager
def _made(recipe: Recipe, num_ranks: int) -> Iterator[RunFolder]:
    run = RunFolder(run_folder(recipe))
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{run.path}: cannot be made ({error.strerror}); give another run.dir"
        ) from error
    with _locked(run.path):
        check_run(recipe)
        with writing(run.path):
            run.checkpoints.mkdir(exist_ok=True)
        # The text goes first: a folder with recipe.json is complete.
        replace_text(run.path / "recipe.yaml", written_out(recipe))
        replace_text(run.path / "environment.json", json.dumps(environment(num_ranks), indent=1))
        replace_text(run.path / "recipe.json", resolved_json(recipe))
        with _status(run.path / "status.json", recipe):
            yield run


@contextlib.contextmanager
def _status(file: Path, recipe: Recipe) -> Iterator[None]:
    """Says in a file that the run goes on, and at the end how and why it ended."""
    origin = recipe.origin
    status = {
        "recipe": origin.source or recipe.name,
        "overrides": origin.overrides,
        "steps": recipe.steps,
        "started": _now(),
    }

    def write(state: str, why: str = "", **more: str) -> None:
        replace_text(file, json.dumps({**status, "state": state, "why": why, **more}, indent=1))

    write("running")
    try:
        yield
    except BaseException as error:
        why = str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        with contextlib.suppress(StageError):  # of a full disk the error says more
            write(state, " ".join(why.split()), error=type(error).__name__, ended=_now())
        raise
    write("finished", ended=_now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_run(recipe: Recipe) -> RunFolder:
    """The run folder of a recipe, which need not exist yet; writes nothing.

    An InputError for a file, a folder of something else, and steps of another recipe. A start that
    failed before its first step holds nothing to keep: any recipe may take its folder.
    """
    run = RunFolder(run_folder(recipe))
    if not run.path.exists():
        return run
    if not run.path.is_dir():
        raise InputError(f"{run.path}: is a file; give another run.dir")
    saved = run.path / "recipe.json"
    is_run = any(path.exists() for path in (saved, run.checkpoints, run.path / ".lock"))
    if not is_run and any(run.path.iterdir()):
        raise InputError(f"{run.path}: is not empty and not a run folder; give another run.dir")
    if not (run.metrics.exists() or checkpoints(run.checkpoints)):
        return run
    if not saved.exists():
        raise InputError(f"{run.path}: holds a run without recipe.json; give another run.dir")
    changed = diff_recipes(load_recipe(saved), recipe)
    differing = [key for key in changed if not recipe.may_change(key)]
    if differing:
        raise InputError(
            f"{run.path}: holds a run of another recipe (differs in {', '.join(differing)}); "
            "give another run.dir, or the same settings"
        )
    return run


def _step_of(line: str) -> int:
    """The step of a metrics line; one that a stop cut short, or no run wrote, counts as none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return sys.maxsize


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with writing(folder / ".lock"):
        descriptor = open_lock(folder / ".lock")
    with open(descriptor, "r+"):
        for last in (False, False, True):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if last:
                    text = "another process trains this run; wait for it"
                    raise InputError(f"{folder}: {text}") from error
                time.sleep(0.05)  # `stage runs` holds it for a moment
        yield
