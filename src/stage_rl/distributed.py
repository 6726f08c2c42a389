"""Several processes that train one run: which of them this is, and what they tell each other.

`torchrun` starts the processes, one per GPU, and writes their ranks into environment variables,
which this module alone reads. Without them there is one rank, and a value is its own sum.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from stage_rl.errors import InputError, RankError, RecipeError, StageError, Stopped

T = TypeVar("T")

PACKAGES = ("stage-rl", "torch", "transformers", "numpy", "numba", "safetensors")
"""Whose versions a run notes."""

LONGEST_WAIT = timedelta(minutes=30)
"""For another rank, with its slow rewards say, before it counts as lost."""

GRACE_S = 2.0
"""For the rank that tells the reason: torchrun ends all when the first process has exited."""

REASON = "stage_rl/reason"
"""Key of the store under which the first rank that fails says why."""


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them; prompts and shards go by rank."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine, and number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this rank writes the run folder and speaks to the user."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in shards."""
        return self.size > 1

    def check_even(self, count: int, key: str) -> None:
        """A RecipeError where `count` groups of a recipe's key cannot be split over the ranks."""
        if count % self.size:
            raise RecipeError(
                f"{key}: {count} groups cannot be split evenly over {self.size} processes; write a "
                f"multiple of {self.size}, or start {math.gcd(count, self.size)} of them"
            )

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of items that split evenly, in order."""
        assert len(items) % self.size == 0, (len(items), self.size)
        count = len(items) // self.size
        return items[self.rank * count : (self.rank + 1) * count]

    def gather(self, value: T) -> list[T]:
        """What each rank gives, in order of ranks and on the CPU; all ranks get it."""
        if self.size == 1:
            return [value]
        # Pickled tensors would come back on the GPU they left.
        buffer = io.BytesIO()
        torch.save(value, buffer)
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, buffer.getvalue())
        return [torch.load(io.BytesIO(p), map_location="cpu", weights_only=False) for p in parts]

    def concat(self, value: T) -> T:
        """What all ranks hold of a value, one behind the other: see `concat`."""
        return concat(self.gather(value)) if self.size > 1 else value

    def any_of(self, number: int | None) -> int | None:
        """A number that at least one rank has, the same on all; None where none has one."""
        return next((n for n in self.gather(number) if n is not None), None)

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all; a StageError that it raises is raised on all."""
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        if self.first:
            try:
                made = [make()]
            except StageError as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], StageError):
            raise made[0]
        return made[0]

    def check_same(self, value: object, what: str) -> None:
        """A RankError where a value is another one on some rank."""
        parts = self.gather(value)
        others = [rank for rank, part in enumerate(parts) if part != parts[0]]
        if others:
            raise RankError(
                f"{what}: rank {others[0]} has another than rank 0; give all machines the same"
            )

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


SINGLE = World()


def environment(num_ranks: int) -> dict[str, Any]:
    """What a run was made with, as its first process sees it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": cpu_name(),
        "command": " ".join(sys.argv),
        "packages": versions_of(PACKAGES),
        "processes": num_ranks,
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {name: next(iter(metadata.distributions(name=name)), None) for name in packages}
    return {name: package.version for name, package in found.items() if package is not None}


def cpu_name() -> str:
    """The model of the processor, on which digits depend: not all round bf16 products alike."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def concat(parts: Sequence[Any]) -> Any:
    """Parts of a value, of micro-batches or ranks, as one value.

    Tensors, which have rows, and sequences lie one behind the other; dataclasses and mappings go by
    field; everything else is the same in all parts. A tensor of a mapping that some part lacks is
    NaN there.
    """
    head = parts[0]
    if isinstance(head, Tensor):
        return torch.cat(list(parts))
    if dataclasses.is_dataclass(head) and not isinstance(head, type):
        names = [field.name for field in dataclasses.fields(head)]
        return type(head)(**{n: concat([getattr(part, n) for part in parts]) for n in names})
    if isinstance(head, Mapping):
        return {name: concat(_column(parts, name)) for part in parts for name in part}
    if isinstance(head, list | tuple):
        return type(head)(item for part in parts for item in part)
    return head


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank asks for it at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _column(parts: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor]:
    known = next(part[name] for part in parts if name in part)
    return [part[name] if name in part else torch.full_like(known, math.nan) for part in parts]


def launched() -> World:
    """The place of this process, by torchrun's environment variables; one process without them."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not (given["RANK"] or given["WORLD_SIZE"]):
        return SINGLE
    hint = "start with torchrun, or unset RANK and WORLD_SIZE"
    numbers = {name: int(text) for name, text in given.items() if text and text.isdecimal()}
    for name, text in given.items():
        if name not in numbers and (text or name != "LOCAL_RANK"):
            raise InputError(f"{name}: '{text or ''}' is not the number of a process; {hint}")
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= size:
        raise InputError(f"RANK: {rank} is not below WORLD_SIZE ({size}); {hint}")
    return World(rank, size, numbers.get("LOCAL_RANK", rank))


@contextmanager
def init_distributed(device: torch.device) -> Iterator[World]:
    """Meets the other ranks, and leaves them at the end.

    A failure on one rank ends all: the first to fail raises its error, the others exit without a
    word of their own. A rank that was lost without a reason is a RankError.
    """
    world = launched()
    if world.size == 1:
        yield world
        return
    if device.type == "cuda":
        _take_gpu(world)
    try:
        store, _, _ = next(rendezvous("env://", timeout=LONGEST_WAIT))
    except ValueError as error:  # a variable that is missing
        raise InputError(f"{' '.join(str(error).split())}; start with torchrun") from error
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=LONGEST_WAIT,
    )
    try:
        yield world
    except Exception as error:
        if isinstance(error, Stopped):  # on all ranks, after the same step
            dist.destroy_process_group()
        if not _is_first_to_fail(store, world, error):
            time.sleep(GRACE_S)
            sys.exit(error.exit_code if isinstance(error, StageError) else 1)
        if not isinstance(error, Stopped):
            get_error_handler().record_exception(error)  # for torchrun's own summary
        if _is_loss(error):
            raise RankError(_lost(error)) from error
        raise
    # The first rank holds the store: it must not end while another still says goodbye.
    dist.barrier()
    dist.destroy_process_group()


def pick_device(name: str | torch.device | None = None, *, key: str = "device") -> torch.device:
    """The device of that name; of None or auto the GPU where there is one.

    An InputError for one that is unknown or absent.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise InputError(f"{key}: unknown '{name}'; write cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{key}: no GPU is visible here; write cpu")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"{key}: there is no '{name}'; the last GPU here is cuda:{count - 1}")
    return device


def release_unused() -> None:
    """Gives back the memory of a GPU that no tensor is in, so that others can take it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _take_gpu(world: World) -> None:
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise RecipeError(
            f"training.device: process {world.local_rank} of this machine has no GPU of its own, "
            f"{count} are visible; start with --nproc-per-node {count}, or write cpu"
        )
    torch.cuda.set_device(world.local_rank)


def _is_first_to_fail(store: Store, world: World, error: Exception) -> bool:
    """Leaves the reason for the other ranks, unless one of them was before."""
    reason = json.dumps({"rank": world.rank, "error": type(error).__name__, "text": str(error)})
    try:
        return store.compare_set(REASON, "", reason).decode() == reason
    except RuntimeError:
        return True  # the store ended with the process that held it


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another rank no longer answers."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _lost(error: Exception) -> str:
    text = str(error).strip().splitlines()[-1]
    return (
        f"another process of the run was killed or fell silent ({text}); run the same command "
        "again: it goes on from the last checkpoint"
    )
