"""What a checkpoint holds: trained parameters, the optimizer's state, a refreshed reference.

One process writes safetensors and one file of moments; several write shards. Either form is read by
any number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage_rl.errors import CheckpointError
from stage_rl.training.sharding import is_sharded, spread_like
from stage_rl.training.shards import has_shards, read_shards, stored, write_shards

MOMENTS = "optimizer.pt"


@dataclass(frozen=True)
class Contents:
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


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def base_digest(module: nn.Module) -> str:
    """SHA-256 over all parameters as they were loaded: names in order, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)};".encode())
        values = parameter.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_contents(folder: Path, contents: Contents) -> None:
    """Writes the files; where the module is in shards, all ranks at the same time."""
    parts = contents.parameters()
    if is_sharded(contents.module):
        named = {f"{part}.{n}": t for part, tensors in parts.items() for n, t in tensors.items()}
        write_shards(folder, named | _moments(contents))
        return
    for part, tensors in parts.items():
        whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(whole, folder / f"{part}.safetensors")
    torch.save(contents.optimizer.state_dict(), folder / MOMENTS)


def load_parameters(folder: Path, part: str, module: nn.Module) -> bool:
    """Puts the parameters of `policy` or `reference` into a module, in place; False where a
    checkpoint has no such part. What does not fit the module is a CheckpointError.
    """
    file, parameters = folder / f"{part}.safetensors", dict(module.named_parameters())
    if has_shards(folder):
        held = stored(folder, f"{part}.")
    else:
        held = load_file(file) if file.exists() else {}
    if not held:
        return False
    _check_fit(folder, held, module)
    if has_shards(folder):
        targets = {f"{part}.{name}": parameters[name].detach() for name in held}
        read_shards(folder, targets, alone=not is_sharded(module))
        return True
    with torch.no_grad():
        for name, tensor in held.items():
            parameters[name].copy_(spread_like(tensor, parameters[name]))
    return True


def load_moments(folder: Path, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Restores the optimizer of a module's trained parameters."""
    trained = trained_parameters(module)
    if has_shards(folder):
        found = _read_moments(folder, trained, alone=not is_sharded(module))
        state = optimizer.state_dict()
        state["state"] = {i: found[name] for i, name in enumerate(trained) if name in found}
    else:
        state = torch.load(folder / MOMENTS, weights_only=True, map_location="cpu")
        likes = list(trained.values())
        for index, slots in state["state"].items():
            slots.update({slot: spread_like(v, likes[index]) for slot, v in slots.items()})
    optimizer.load_state_dict(state)


def _moments(contents: Contents) -> dict[str, Tensor]:
    """The optimizer's state by slot and name of the parameter."""
    state = contents.optimizer.state
    return {
        f"optimizer.{slot}.{name}": value
        for name, parameter in trained_parameters(contents.module).items()
        for slot, value in state.get(parameter, {}).items()
    }


def _read_moments(
    folder: Path, trained: Mapping[str, nn.Parameter], *, alone: bool
) -> dict[str, dict[str, Tensor]]:
    """The state of each parameter by slot, whole or in shards as the parameter is."""
    found: dict[str, dict[str, Tensor]] = {}
    targets: dict[str, Tensor] = {}
    for key, held in stored(folder, "optimizer.").items():
        slot, _, name = key.partition(".")
        if name not in trained:
            raise CheckpointError(f"{folder}: holds moments of '{name}', which does not train")
        like: Any = trained[name] if held.shape == trained[name].shape else held
        device = like.device if like is not held else "cpu"
        target = torch.zeros_like(like, dtype=held.dtype, device=device)
        targets[f"optimizer.{key}"] = found.setdefault(name, {})[slot] = target
    read_shards(folder, targets, alone=alone)
    return found


def _check_fit(folder: Path, held: Mapping[str, Tensor], module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    for name, tensor in held.items():
        if name not in parameters:
            raise CheckpointError(f"{folder}: holds '{name}', which the model lacks")
        if parameters[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: '{name}' is {tuple(tensor.shape)}, the model has "
                f"{tuple(parameters[name].shape)}"
            )
    missing = [name for name in trained_parameters(module) if name not in held]
    if missing:
        raise CheckpointError(f"{folder}: lacks '{missing[0]}', which the recipe trains")
