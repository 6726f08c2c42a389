"""The frame of every benchmark: its result, timing in turn, peak memory, rates of the machine.

A benchmark is a module with a `BAR` and a `run`, which takes the command-line options as keyword
arguments, measures its forms and returns a `BenchResult`.
"""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stage_rl.console import aligned
from stage_rl.distributed import cpu_name

Group = Annotated[int, Field(ge=2)]
Guidance = Annotated[float, Field(gt=1)]
"""Above 1: transformers' generate draws no unconditional rows at 1."""


class BenchResult(NamedTuple):
    """What one benchmark measured."""

    headline: str
    """The ratio and what it compares, in words."""
    reached: bool | None
    """Whether the bar is reached; None where it is not set for these sizes."""
    measures: Mapping[str, float]
    """Figures by name; durations and sizes carry their unit in it."""
    table: tuple[str, ...] = ()
    """Lines to print above the one line; their figures are among the measures."""


Rows = Mapping[str, Mapping[str, float]]


def flat(rows: Rows) -> dict[str, float]:
    """The figures of a table as measures, ROW_COLUMN."""
    return {
        f"{row}_{name}": value for row, figures in rows.items() for name, value in figures.items()
    }


def table(rows: Rows, formats: Mapping[str, str]) -> tuple[str, ...]:
    """The lines of a table, each column in its format; what a row lacks stays empty."""
    lines = [["", *formats]]
    for row, figures in rows.items():
        cells = (f"{figures[c]:{formats[c]}}" if c in figures else "" for c in formats)
        lines.append([row, *cells])
    return tuple(line.rstrip() for line in aligned(lines))


def machine() -> dict[str, Any]:
    """The processor, accelerator and versions that figures belong to.

    A load average above the number of cores says that others ran beside the benchmark.
    """
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def on_h200() -> bool:
    """Whether the bars of a GPU are set for this machine."""
    return torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    calls: int = 1,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds per call of each function over `rounds`, after one round to warm up.

    A function far below a millisecond is timed over several `calls`. For work on one CPU thread
    `timer=time.thread_time` counts what the thread ran, not what it waited for others: wall time on
    a busy machine stretches the longer function more and so flatters the shorter.
    """

    def timed(function: Callable[[], Any]) -> dict[str, float]:
        return {"s": seconds_of(function, calls, timer) / calls}

    forms = {name: functools.partial(timed, function) for name, function in functions.items()}
    return {name: medians["s"] for name, medians in medians_in_turn(forms, rounds).items()}


def medians_in_turn(
    forms: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Median of every figure that a form returns, by form, after one round to warm up.

    Each round has every form once, so a change of load falls on all of them.
    """
    seen = [{name: form() for name, form in forms.items()} for _ in range(rounds + 1)][1:]
    return {
        name: {key: statistics.median(round_[name][key] for round_ in seen) for key in figures}
        for name, figures in seen[0].items()
    }


def seconds_of(
    function: Callable[[], Any], calls: int = 1, timer: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of some calls, with what they leave a GPU to do."""
    _synchronize()
    start = timer()
    for _ in range(calls):
        function()
    _synchronize()
    return timer() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes of tensors alive at one time during a call, beyond those alive before it.

    On a GPU the allocator's own figure; on a CPU the storages that operations return, forward and
    backward, without what an operation holds inside itself.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _StorageWatch() as watch:
        function()
    return watch.peak


class _StorageWatch(TorchDispatchMode):
    """Adds up the storages that appear inside the block, each until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        """Of every storage alive that was seen; 0 for one that existed before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # What an operation is given existed before: a view or in-place result of it is not new.
        self._see((args, kwargs), new=False)
        result = func(*args, **(kwargs or {}))
        self._see(result, new=True)
        self.peak = max(self.peak, sum(self._bytes.values()))
        return result

    def _see(self, values: Any, *, new: bool) -> None:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._bytes:
                    self._bytes[key] = storage.nbytes() if new else 0
                    weakref.finalize(storage, self._bytes.pop, key, None)


def copy_bytes_per_s(device: torch.device, timer: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy reads and writes, far larger than what a processor caches."""
    size, calls = (2**30, 20) if device.type == "cuda" else (2**27, 1)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    forms = {"copy": lambda: target.copy_(source)}
    return 2 * size / interleaved(forms, 5, calls=calls, timer=timer)["copy"]


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matmul of two square matrices.

    Of random numbers: with equal ones a GPU draws less power and keeps a higher clock.
    """
    side, calls = (8192, 20) if device.type == "cuda" else (1024, 1)
    matrix = torch.randn(side, side, device=device).to(dtype)
    forms = {"matmul": lambda: matrix @ matrix}
    return 2 * side**3 / interleaved(forms, 5, calls=calls)["matmul"]
