"""Weights published in other layouts than transformers', renamed tensor by tensor.

A table lists every tensor of the foreign layout; one that is missing or over is a `WeightsError`
with its foreign name, one of another shape with ours. Files are read without running anything in
them.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from stage_rl.errors import WeightsError
from stage_rl.rewards.weights import DTYPES, LOADING_ERRORS, load_part, quietly, refuse

Names = Mapping[str, str | tuple[str, ...]]
"""From a foreign name to ours; to several where the tensor is split along its first axis."""


def find_file(path: str, name: str) -> Path:
    """A file of a folder or of a hub repository, which is downloaded once."""
    return Path(load_part(lambda source: str(cached_file(source, name)), path, f"'{name}'"))


def read_tensors(file: Path, *, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a torch file, or of the entry of that name in it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (*LOADING_ERRORS, EOFError, pickle.UnpicklingError) as error:
        text = " ".join(str(error).split())[:300]
        raise WeightsError(f"{file}: holds no tensors that can be read: {text}") from error
    if entry is not None:
        if not isinstance(content, dict) or entry not in content:
            raise WeightsError(f"{file}: has no '{entry}'; write the file as published")
        content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise WeightsError(f"{file}: holds more than named tensors; write the file as published")
    return content


def rename(tensors: Mapping[str, Tensor], names: Names, *, source: str) -> dict[str, Tensor]:
    """The tensors under our names."""
    _refuse(source, {"missing": names.keys() - tensors, "unexpected": tensors.keys() - names})
    renamed = {}
    for name, new in names.items():
        if isinstance(new, str):
            renamed[new] = tensors[name]
        else:
            parts = tensors[name].chunk(len(new))
            renamed |= {ours: part.clone() for ours, part in zip(new, parts, strict=True)}
    return renamed


def fill(
    model_class: Any,
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    """A frozen transformers model in eval mode with these tensors, by its checkpoint names."""
    load = functools.partial(
        model_class.from_pretrained,
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=DTYPES[dtype],
        ignore_mismatched_sizes=True,  # to be named below, together with the missing
        output_loading_info=True,
        **options,
    )
    module, info = quietly(load, source, "the weights")
    shapes = {entry[0] for entry in info["mismatched_keys"]}
    named = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
    _refuse(source, {**named, "of another shape": shapes})
    nn.Module.to(module, device)
    return module.requires_grad_(False).eval()


def fill_part(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copies tensors into a small module of ours (in place), which is frozen."""
    own = module.state_dict()
    shapes = {name for name in own.keys() & tensors if own[name].shape != tensors[name].shape}
    _refuse(
        source,
        {
            "missing": own.keys() - tensors,
            "unexpected": tensors.keys() - own,
            "of another shape": shapes,
        },
    )
    module.load_state_dict(dict(tensors))
    module.requires_grad_(False).eval()


def _refuse(source: str, faults: Mapping[str, Iterable[str]]) -> None:
    refuse(f"{source}: the tensors do not fit the model", faults, "write the file as published")
