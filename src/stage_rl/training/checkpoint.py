"""Checkpoints: everything needed to go on, written whole or not at all.

A checkpoint is a folder `checkpoints/step_000040` with the trained parameters, the optimizer's
state, and a manifest of SHA-256 sums that is written last. It is made under a temporary name and
renamed when it is complete; whoever loads it checks the sums first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from stage_rl.errors import CheckpointError
from stage_rl.training.contents import Contents, load_moments, load_parameters, write_contents
from stage_rl.training.distributed import ALONE, Ranks

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerState:
    """The numbers of a run that no tensor holds."""

    step: int
    """Steps done."""
    signs: Mapping[str, int]
    """Counters of the liveness checks."""
    base: str = ""
    """`base_digest` of the weights the run began with; empty in checkpoints that lack it."""
    best_step: int | None = None
    """Steps of the checkpoint that is best by the held-out panel; None: there was no panel yet."""
    best_score: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose sums were found right."""

    folder: Path
    state: TrainerState

    def check_base(self, digest: str) -> None:
        """A checkpoint holds what trains: the rest must be the weights the run began with."""
        if self.state.base and self.state.base != digest:
            raise CheckpointError(
                f"{self.folder}: the weights behind policy.path are not those the run began with; "
                "put these back, or train anew in another run.dir"
            )

    def load_policy(self, module: nn.Module) -> None:
        """Puts the trained parameters into a module, in place."""
        if not load_parameters(self.folder, "policy", module):
            raise CheckpointError(f"{self.folder}: holds no parameters; name another checkpoint")

    def load_reference(self, module: nn.Module) -> bool:
        """Puts a refreshed reference into a module; False where it never was refreshed."""
        return load_parameters(self.folder, "reference", module)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        """Restores the optimizer's moments of a module's trained parameters."""
        load_moments(self.folder, optimizer, module)


def save_checkpoint(
    root: Path,
    contents: Contents,
    *,
    state: TrainerState,
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes `root`/step_N and removes all but the newest `keep` and the best; all ranks call it.

    A failed write is a CheckpointError and leaves the older checkpoints as they are.
    """
    final, temporary = root / f"step_{state.step:06d}", root / f".step_{state.step:06d}.tmp"
    try:
        _write_parts(temporary, contents, state, ranks)
        if ranks.first:
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
    # safetensors and torch wrap a full disk in errors of their own
    except (OSError, RuntimeError, SafetensorError) as error:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written ({error}); make room and run the same command again: "
            "it goes on from the checkpoint before"
        ) from error
    if ranks.first:
        _prune(root, state, keep)
    ranks.wait()
    return final


def _write_parts(folder: Path, contents: Contents, state: TrainerState, ranks: Ranks) -> None:
    """All files of a checkpoint; the manifest comes last."""
    if ranks.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(asdict(state)))
    ranks.wait()
    write_contents(folder, contents)
    ranks.wait()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Each rank sums up some of the files: they may hold a hundred gigabytes.
    mine = {str(path.relative_to(folder)): _sum(path) for path in files[ranks.rank :: ranks.size]}
    sums = {name: value for part in ranks.gather(mine) for name, value in part.items()}
    if ranks.first:
        _write_synced(folder / MANIFEST, json.dumps(sums, indent=1, sort_keys=True))


def _prune(root: Path, state: TrainerState, keep: int) -> None:
    """Leaves the newest `keep` and the best.

    Those above the step are damaged ones that the run fell back from.
    """
    found = checkpoints(root)
    written = [folder for folder in found if step_of(folder) <= state.step]
    for folder in found:
        if folder in written[:keep] or step_of(folder) == state.best_step:
            continue
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: could not be removed ({error.strerror}); remove it and run the same "
                "command again"
            ) from error


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first; other names are not looked at."""
    named = [path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(named, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The steps that were done when a checkpoint folder was written, by its name."""
    return int(folder.name.removeprefix("step_"))


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None where a run has none at all.

    A damaged one is passed over with a warning. Where all are damaged, a CheckpointError.
    """
    found = checkpoints(root)
    for folder in found:
        problem = damage(folder)
        if problem is None:
            return read_checkpoint(folder)
        log.warning("%s: %s; falling back to the checkpoint before", folder, problem)
    if found:
        raise CheckpointError(
            f"{root}: no good checkpoint is left ({len(found)} are damaged); "
            "remove the run folder to start again"
        )
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint by its folder; a damaged one is a CheckpointError."""
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}; name another checkpoint of the run")
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(folder, TrainerState(**state))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when it is whole."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        if "state.json" not in sums:
            return f"{MANIFEST} lists no state.json"
        return next(
            (
                f"{name} is damaged"
                for name, wanted in sums.items()
                if _sum(folder / name) != wanted
            ),
            None,
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
