"""The tensors of a folder, by name; nothing in a file is ever run.

safetensors files hold tensors alone. `.bin` and `.pt` files are pickles, and are read with
`weights_only=True`, which refuses everything that is not a tensor in plain containers.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stage_rl.errors import WeightsError
from stage_rl.policies.hub import one_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
ENDINGS = (".safetensors", ".bin", ".pt")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped into memory where the format allows it.

    A folder without weights, a damaged file, and one that holds more than tensors are a
    `WeightsError`.
    """
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(folder):
        part = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
        twice = tensors.keys() & part.keys()
        if twice:
            raise WeightsError(f"{file}: '{min(twice)}' is in another file too; remove one of them")
        tensors.update(part)
    return tensors


def tensor_files(folder: Path) -> list[Path]:
    """The files with the weights of a folder: those of its index, or the one that there is."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        return _indexed(index)
    single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
    if single is not None:
        return [single]
    others = sorted(path for path in folder.glob("*") if path.suffix in ENDINGS)
    if len(others) == 1:
        return others
    found = f"several: {', '.join(path.name for path in others)}" if others else "none"
    raise WeightsError(
        f"{folder}: cannot load the weights: {SINGLE[0]} or {INDEXES[0]} is looked for, or one "
        f"file that ends in {', '.join(ENDINGS)} (found {found}); write a complete checkpoint"
    )


def describe_faults(wanted: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape, by name; empty where all is as wanted."""
    both = wanted.keys() & found.keys()
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {name for name in both if wanted[name] != found[name].shape},
    }
    return "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{index}: cannot be read: {one_line(error)}") from error
    for name in names:
        if Path(name).name != name:
            raise WeightsError(f"{index}: names '{name}', which lies elsewhere; write file names")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index}: names {name}, which is missing; complete the checkpoint")
    return [index.parent / name for name in names]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot load the weights: {one_line(error)}") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(file)
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: holds more than tensors, or is damaged; nothing of it was run; "
            "write a safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{file}: cannot load the weights: {one_line(error)}") from error
    if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
        raise WeightsError(f"{file}: is no mapping of names to tensors; write a state_dict alone")
    return {str(name): tensor for name, tensor in held.items()}
