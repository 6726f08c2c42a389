"""Checkpoints: everything needed to go on, written whole or not at all.

A checkpoint is a folder `checkpoints/step_000040` with the trained parameters, the optimizer's
state, and a manifest of SHA-256 sums that is written last. It is made under a temporary name and
renamed when it is complete; whoever loads it checks the sums first.

One process writes safetensors and one file of moments; several write shards in the format of
`torch.distributed.checkpoint`. Any number of processes reads either form, and the manifest says
which it is. A run folder may be anyone's: nothing of it is run. The index of shards is a pickle, of
which no more is let in than the records of tensors that it is made of.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stage_rl.distributed import SINGLE, World
from stage_rl.errors import CheckpointError
from stage_rl.files import sync, writing
from stage_rl.policies.loading import LOADING_ERRORS, one_line
from stage_rl.training.parallelize import is_sharded, spread_like

MANIFEST = "manifest.json"

MOMENTS = "optimizer.pt"

SHARDS = "shards"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is: what no tensor holds."""

    step: int
    """Steps done."""
    counters: Mapping[str, int]
    """Of the liveness checks and tripwires."""
    base: str = ""
    """`base_digest` of the weights the run began with; empty in checkpoints that lack it."""
    best_step: int | None = None
    """Steps of the checkpoint that is best by held-out validation; None: there was none yet."""
    best_score: float | None = None
    validation: str = ""
    """Stands for the settings of the validation that found the best."""


@dataclass(frozen=True)
class TrainState:
    """The parts of a run that hold tensors."""

    module: nn.Module
    """The policy's."""
    optimizer: torch.optim.Optimizer
    reference: nn.Module | None = None
    """The reference's, where it is not the policy that the run began with."""

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """What trains, by part and name; of the reference the parameters of the same names."""
        names = trained_parameters(self.module)
        parts = {"policy": {name: p.detach() for name, p in names.items()}}
        if self.reference is not None:
            frozen = dict(self.reference.named_parameters())
            parts["reference"] = {name: frozen[name].detach() for name in names}
        return parts

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, by slot and name of the parameter."""
        state = self.optimizer.state
        return {
            f"{slot}.{name}": value
            for name, parameter in trained_parameters(self.module).items()
            for slot, value in state.get(parameter, {}).items()
        }


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose sums were found right."""

    folder: Path
    state: Progress
    in_shards: bool = False
    """Whether its manifest lists shards."""

    def check_base(self, digest: str) -> None:
        """A checkpoint holds what trains: the rest must be the weights the run began with."""
        if self.state.base and self.state.base != digest:
            raise CheckpointError(
                f"{self.folder}: the weights behind policy.path are not those the run began with; "
                "put these back, or train anew in another run.dir"
            )

    def load_policy(self, module: nn.Module) -> None:
        """Puts the trained parameters into a module, in place."""
        if not self.load_part("policy", module):
            raise CheckpointError(f"{self.folder}: holds no parameters; name another checkpoint")

    def load_part(self, part: Literal["policy", "reference"], module: nn.Module) -> bool:
        """Puts the parameters of a part into a module, in place; False where there are none, as of
        a reference that never was refreshed.
        """
        held, file = {}, self.folder / f"{part}.safetensors"
        with self._loading(part):
            if self.in_shards:
                held = self._stored(f"{part}.")
            elif file.exists():
                held = load_file(file)
        if not held:
            return False
        parameters = self._check_fit(held, module)
        if self.in_shards:
            targets = {f"{part}.{name}": parameters[name].detach() for name in held}
            self._read_shards(targets, alone=not is_sharded(module))
            return True
        with torch.no_grad():
            for name, tensor in held.items():
                parameters[name].copy_(spread_like(tensor, parameters[name]))
        return True

    def load_optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        """Restores the optimizer's moments of a module's trained parameters."""
        trained = trained_parameters(module)
        with self._loading("optimizer"):
            if self.in_shards:
                found = self._read_moments(trained, alone=not is_sharded(module))
                state = optimizer.state_dict()
                state["state"] = {i: found[name] for i, name in enumerate(trained) if name in found}
            else:
                state = torch.load(self.folder / MOMENTS, weights_only=True, map_location="cpu")
                likes = list(trained.values())
                for index, slots in state["state"].items():
                    slots.update({slot: spread_like(v, likes[index]) for slot, v in slots.items()})
            optimizer.load_state_dict(state)

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        """Files whose sums are right may yet be what no training wrote."""
        try:
            yield
        except (*LOADING_ERRORS, IndexError) as error:
            raise CheckpointError(
                f"{self.folder}: its {what} cannot be loaded ({one_line(error)}); name another "
                "checkpoint of the run"
            ) from error

    def _check_fit(self, held: Mapping[str, Tensor], module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of a module, which must take what is held, and train nothing else."""
        parameters = dict(module.named_parameters())
        for name, tensor in held.items():
            if name not in parameters:
                raise CheckpointError(f"{self.folder}: holds '{name}', which the model lacks")
            if parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{self.folder}: '{name}' is {tuple(tensor.shape)}, the model has "
                    f"{tuple(parameters[name].shape)}"
                )
        missing = [name for name in trained_parameters(module) if name not in held]
        if missing:
            raise CheckpointError(f"{self.folder}: lacks '{missing[0]}', which the recipe trains")
        return parameters

    def _read_moments(
        self, trained: Mapping[str, nn.Parameter], *, alone: bool
    ) -> dict[str, dict[str, Tensor]]:
        """The state of each parameter by slot, whole or in shards as the parameter is."""
        found: dict[str, dict[str, Tensor]] = {}
        targets: dict[str, Tensor] = {}
        for key, held in self._stored("optimizer.").items():
            slot, _, name = key.partition(".")
            if name not in trained:
                raise CheckpointError(
                    f"{self.folder}: holds moments of '{name}', which does not train"
                )
            like: Any = trained[name] if held.shape == trained[name].shape else held
            device = like.device if like is not held else "cpu"
            target = torch.zeros_like(like, dtype=held.dtype, device=device)
            targets[f"optimizer.{key}"] = found.setdefault(name, {})[slot] = target
        self._read_shards(targets, alone=alone)
        return found

    def _stored(self, prefix: str) -> dict[str, Tensor]:
        """The tensors in shards whose names begin with a prefix, without it and without values."""
        metadata = _ShardReader(self.folder / SHARDS).read_metadata()
        return {
            name.removeprefix(prefix): torch.empty(
                entry.size, dtype=entry.properties.dtype, device="meta"
            )
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def _read_shards(self, targets: Mapping[str, Tensor], *, alone: bool) -> None:
        """Fills tensors by their names, in place.

        `alone`: by this process for itself, into whole tensors. Else all ranks call together.
        """
        reader = _ShardReader(self.folder / SHARDS)
        try:
            with warnings.catch_warnings():
                # It warns of the single process that was asked for.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(dict(targets), storage_reader=reader, no_dist=alone)
        except CheckpointException as error:
            raise CheckpointError(
                f"{self.folder}: {_first_line(error)}; name another checkpoint of the run"
            ) from error


class _ShardReader(FileSystemReader):
    """Reads shards without running anything: torch's own reader runs what their index says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; a `pickle.UnpicklingError` where it holds anything but records of tensors."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        for entry in metadata.storage_data.values():
            if Path(entry.relative_path).name != entry.relative_path:
                raise pickle.UnpicklingError(f"'{entry.relative_path}' lies elsewhere")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Makes the records of an index and refuses every other name."""

    RECORDS: ClassVar = {
        "torch.distributed.checkpoint.metadata": (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
            *("ChunkStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        "pathlib": ("PosixPath",),
    }

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # so Python 3.13 names it
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is not run")


def save_checkpoint(
    root: Path,
    train_state: TrainState,
    *,
    state: Progress,
    keep: int = 2,
    world: World = SINGLE,
) -> Path:
    """Writes `root`/step_N and removes all but the newest `keep` and the best; all ranks call it.

    A failed write is a CheckpointError and leaves the older checkpoints as they are.
    """
    final, temporary = root / f"step_{state.step:06d}", root / f".step_{state.step:06d}.tmp"
    with writing(final):
        try:
            _write(temporary, train_state, state, world)
            if world.first:
                if final.exists():
                    shutil.rmtree(final)
                temporary.rename(final)
                sync(root)  # before an older one goes
        finally:
            if world.first:
                shutil.rmtree(temporary, ignore_errors=True)
    if world.first:
        _prune(root, state, keep)
    world.wait()
    return final


def _write(folder: Path, train_state: TrainState, state: Progress, world: World) -> None:
    """All files of a checkpoint; the manifest comes last."""
    if world.first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(asdict(state)))
    world.wait()
    _write_tensors(folder, train_state)
    world.wait()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Each rank sums up some of the files: they may hold a hundred gigabytes. They are on the disk
    # before a manifest says that they are there.
    mine = files[world.rank :: world.size]
    for path in mine:
        _open_to_umask(path, like=folder / "state.json")
        sync(path)
    found = {str(path.relative_to(folder)): _sum(path) for path in mine}
    sums = {name: value for part in world.gather(found) for name, value in part.items()}
    if world.first:
        for inner in {path.parent for path in files}:
            sync(inner)
        (folder / MANIFEST).write_text(json.dumps(sums, indent=1, sort_keys=True))
        sync(folder / MANIFEST)
        sync(folder)


def _open_to_umask(path: Path, *, like: Path) -> None:
    """safetensors makes files that nobody else can read, whatever the umask says."""
    path.chmod(stat.S_IMODE(like.stat().st_mode))


def _write_tensors(folder: Path, train_state: TrainState) -> None:
    """Where the module is in shards, all ranks write theirs at the same time."""
    parts = train_state.parameters()
    if not is_sharded(train_state.module):
        for part, tensors in parts.items():
            whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(whole, folder / f"{part}.safetensors")
        with (folder / MOMENTS).open("wb") as file:  # by its path torch hides why a write fails
            torch.save(train_state.optimizer.state_dict(), file)
        return
    parts["optimizer"] = train_state.moments()
    named = {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
    try:
        save(named, storage_writer=FileSystemWriter(folder / SHARDS))
    except CheckpointException as error:
        raise OSError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    causes = getattr(error, "failures", {}).values()
    return str(next((cause for cause, _ in causes), error)).splitlines()[0]


def _prune(root: Path, state: Progress, keep: int) -> None:
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
    """The checkpoint folders of a run, newest first; other names are not looked at.

    A CheckpointError where one is a file or a link, or the folder cannot be read.
    """
    with _readable(root):
        found = list(root.iterdir()) if root.exists() else []
    named = [path for path in found if re.fullmatch(r"step_\d{1,15}", path.name)]
    for path in named:
        if path.is_symlink() or not path.is_dir():
            raise CheckpointError(f"{path}: is not a folder but a file or link; remove it")
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
            "train anew in another run.dir"
        )
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint by its folder; a damaged one is a CheckpointError."""
    problem = damage(folder)
    if problem is not None:
        raise CheckpointError(f"{folder}: {problem}; name another checkpoint of the run")
    sums = json.loads((folder / MANIFEST).read_text())
    try:
        state = json.loads((folder / "state.json").read_text())
        if "signs" in state:  # the former name
            state["counters"] = state.pop("signs")
        progress = TypeAdapter(Progress).validate_python(state)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: state.json is not that of a training; name another checkpoint of the run"
        ) from error
    return Checkpoint(folder, progress, any(name.startswith(f"{SHARDS}/") for name in sums))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when it is whole.

    A CheckpointError where a file cannot be read, which says nothing of what is in it, and where
    there is one that the manifest does not list: a training leaves none.
    """
    with _readable(folder):
        present = _files_of(folder)
        if MANIFEST not in present:
            return f"{MANIFEST} is missing"
        try:
            sums = json.loads((folder / MANIFEST).read_text())
            if "state.json" not in sums:
                return f"{MANIFEST} lists no state.json"
            lost = sorted(sums.keys() - present)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            return f"{MANIFEST} cannot be read ({one_line(error)})"
        if lost:  # or its name in the manifest is damaged, and then another seems to be unlisted
            return f"{lost[0]} is missing"
        unlisted = sorted(present - sums.keys() - {MANIFEST})
        if unlisted:
            raise CheckpointError(
                f"{folder / unlisted[0]}: {MANIFEST} lists no such file; remove it"
            )
        damaged = (name for name, wanted in sums.items() if _sum(folder / name) != wanted)
        return next((f"{name} is damaged" for name in damaged), None)


def _files_of(folder: Path) -> set[str]:
    """The names of all files, relative to a folder; a link or a device is a CheckpointError."""

    def fail(error: OSError) -> None:
        raise error

    names = set()
    for place, folders, files in os.walk(folder, onerror=fail):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CheckpointError(f"{path}: is a link or a device; remove it")
        names |= {str(Path(place, name).relative_to(folder)) for name in files}
    return names


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """A disk or a right that fails is reported as that: what lies there may be whole."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); put that right and "
            "run the same command again"
        ) from error


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
