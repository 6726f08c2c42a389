"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stage_rl.errors import CheckpointError

GO_ON = "make room and run the same command again: it goes on from the last checkpoint"

MOST_STEPS = 2**53
"""What a page's script can count."""
LARGEST_METRIC = 1e100
"""Sums of such numbers stay finite."""


@contextlib.contextmanager
def writing(path: Path, *, hint: str = GO_ON) -> Iterator[None]:
    """Turns a write that fails, on a full disk say, into one clear line."""
    try:
        yield
    # safetensors and torch wrap a full disk in errors of their own.
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: could not be written ({_why(error)}); {hint}") from error


def replace_text(path: Path, text: str, *, hint: str = GO_ON) -> None:
    """`replace_file` with a text."""
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"), hint=hint)


def replace_file(path: Path, write: Callable[[Path], object], *, hint: str = GO_ON) -> None:
    """Writes beside the target and renames, so that a stop leaves the old or the new file.

    `write` gets a path with the suffix of the target, whose folder is made where it is missing.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    with writing(path, hint=hint):
        path.parent.mkdir(exist_ok=True)
        try:
            mode = _create(temporary)
            write(temporary)
            temporary.chmod(mode)  # some writers make files that nobody else can read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_record(file: Path) -> dict[str, Any] | None:
    """A mapping that was written as JSON; None where a file is missing or holds anything else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, none where it is not there; what a stop cut short, or no run
    wrote, is left out: each has a step, numbers, and None for those that were not finite.
    """
    records: list[dict[str, Any]] = []
    if not metrics.exists():
        return records
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and _is_step(record.get("step")):
                records.append({name: value for name, value in record.items() if _is_metric(value)})
    return records


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_STEPS


def _is_metric(value: Any) -> bool:
    """Whether a run may have written it."""
    return value is None or (type(value) in (int, float) and abs(value) < LARGEST_METRIC)


def open_lock(path: Path) -> int:
    """The descriptor of a file that is opened or made; a link is an OSError and not followed."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: Exception) -> str:
    """The system's words, also where torch failed over them."""
    for one in (error, error.__context__):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return " ".join(str(error).split())


def _create(path: Path) -> int:
    """Makes an empty file in place of what a stop or somebody else left; its mode by the umask."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
