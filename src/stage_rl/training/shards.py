"""The part of a checkpoint that all ranks write together: tensors by name, in shards.

Any number of ranks, one too, reads what any number has written. The format is that of
`torch.distributed.checkpoint`. Its index is a pickle: read none whose sums were not checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stage_rl.errors import CheckpointError

FOLDER = "shards"


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was written by several ranks."""
    return (folder / FOLDER).is_dir()


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint's tensors, each rank its own shards; a failure is an OSError on all."""
    try:
        save(dict(tensors), storage_writer=FileSystemWriter(folder / FOLDER))
    except CheckpointException as error:
        raise OSError(_first_line(error)) from error


def read_shards(folder: Path, targets: Mapping[str, Tensor], *, alone: bool) -> None:
    """Fills tensors by their names, in place.

    `alone`: by this process for itself, into whole tensors. Else all ranks call at the same time.
    """
    reader = FileSystemReader(folder / FOLDER)
    try:
        with warnings.catch_warnings():
            # It warns of the single process that was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(targets), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(
            f"{folder}: {_first_line(error)}; name another checkpoint of the run"
        ) from error


def stored(folder: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it: shapes and dtypes, no values."""
    metadata = FileSystemReader(folder / FOLDER).read_metadata()
    return {
        name.removeprefix(prefix): torch.empty(
            entry.size, dtype=entry.properties.dtype, device="meta"
        )
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _first_line(error: BaseException) -> str:
    causes = getattr(error, "failures", {}).values()
    cause = next((c for c, _ in causes), error)
    return str(cause).splitlines()[0]
