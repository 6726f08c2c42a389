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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_rl.errors import CheckpointError
from stage_rl.policies.base import Policy

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
        _load_parameters(module, load_file(self.folder / "policy.safetensors"), self.folder)

    def load_reference(self, module: nn.Module) -> bool:
        """Puts a refreshed reference into a module; False where it never was refreshed."""
        path = self.folder / "reference.safetensors"
        if path.exists():
            _load_parameters(module, load_file(path), self.folder)
        return path.exists()

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Restores the optimizer's moments."""
        state = torch.load(self.folder / "optimizer.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(state)


def base_digest(module: nn.Module) -> str:
    """SHA-256 over all parameters as they were loaded: names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        values = parameter.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def save_checkpoint(
    root: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    *,
    state: TrainerState,
    reference: Policy | None = None,
    keep: int = 2,
) -> Path:
    """Writes `root`/step_N and removes all but the newest `keep` and the best.

    `reference` is given where it differs from the policy the run began with. A failed write is a
    CheckpointError and leaves the older checkpoints as they are.
    """
    names = trained_parameters(policy.module)
    tensors = {"policy": {name: p.detach() for name, p in names.items()}}
    if reference is not None:
        frozen = dict(reference.module.named_parameters())
        tensors["reference"] = {name: frozen[name].detach() for name in names}
    final, temporary = root / f"step_{state.step:06d}", root / f".step_{state.step:06d}.tmp"
    try:
        _write_parts(temporary, tensors, optimizer, state)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    # safetensors and torch wrap a full disk in errors of their own
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written ({error}); make room and run the same command again: "
            "it goes on from the checkpoint before"
        ) from error
    _prune(root, state, keep)
    return final


def _write_parts(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
) -> None:
    """All files of a checkpoint; the manifest comes last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, values in tensors.items():
        save_file(_contiguous(values), folder / f"{name}.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    sums = {path.name: _sum(path) for path in sorted(folder.iterdir())}
    _write_synced(folder / MANIFEST, json.dumps(sums, indent=1))


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


def _load_parameters(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        if name not in parameters:
            raise CheckpointError(f"{folder}: holds '{name}', which the model lacks")
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: '{name}' is {tuple(tensor.shape)}, the model has "
                f"{tuple(parameters[name].shape)}"
            )
    missing = [name for name in trained_parameters(module) if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder}: lacks '{missing[0]}', which the recipe trains")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
