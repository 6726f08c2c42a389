"""The frame of every benchmark: options, result, timing in turn, peak memory, rates of the machine.

A benchmark is a module whose `run`, decorated with `benchmark(BAR)`, takes the command-line options
as keyword arguments, measures its forms and returns a `BenchResult`.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stage_rl.errors import InputError

Options = ParamSpec("Options")


@dataclass(frozen=True)
class BenchResult:
    """What one benchmark measured; `benchmark` fills in the last three fields."""

    headline: str
    """The ratio and what it compares, in words."""
    reached: bool | None
    """Whether the bar is reached; None where it is not set for these sizes."""
    measures: Mapping[str, float]
    """Figures by name; durations and sizes carry their unit in it."""
    table: tuple[str, ...] = ()
    """Lines to print above the one line; their figures are among the measures."""
    name: str = ""
    bar: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """The result as one line."""
        verdict = {True: "reached", False: "MISSED", None: "not set for these sizes"}[self.reached]
        return f"{self.name}: {self.headline}; bar {self.bar}: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """The result and the machine, ready for JSON."""
        figures = asdict(self)
        del figures["table"]
        return figures | {"machine": machine()}


def benchmark(
    bar: str, **least: int
) -> Callable[[Callable[Options, BenchResult]], Callable[Options, BenchResult]]:
    """A decorator: the options are checked, and the result carries name, bar and options.

    A whole number is at least 1, a seed 0, what `least` names as it says; of a tuple every item.
    Below that it is an InputError.
    """

    def decorate(run: Callable[Options, BenchResult]) -> Callable[Options, BenchResult]:
        @functools.wraps(run)
        def measured(*args: Options.args, **kwargs: Options.kwargs) -> BenchResult:
            bound = inspect.signature(run).bind(*args, **kwargs)
            bound.apply_defaults()
            for option, value in bound.arguments.items():
                _check(option, value, least.get(option, 0 if option == "seed" else 1))
            name = run.__module__.rpartition(".")[2].replace("_", "-")
            return replace(run(*args, **kwargs), name=name, bar=bar, settings=bound.arguments)

        return measured

    return decorate


def _check(option: str, value: Any, least: int) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, int) and not isinstance(number, bool) and number < least:
            written = f"--{option.replace('_', '-')}"
            raise InputError(f"{written}: {number} is out of range; write at least {least}")


def check_guided(guidance_scale: float) -> None:
    """Raises InputError for a scale at which transformers' generate draws no unconditional rows."""
    if guidance_scale <= 1:
        raise InputError(
            f"--guidance-scale: transformers' generate needs more than 1, not {guidance_scale}; "
            "write 3"
        )


def columns(*rows: Sequence[str]) -> tuple[str, ...]:
    """The lines of a table, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return tuple(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def machine() -> dict[str, Any]:
    """The processor, accelerator and versions that figures belong to.

    A load average above the number of cores says that others ran beside the benchmark.
    """
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        self._live: dict[int, int] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # What an operation is given existed before: a view or in-place result of it is not new.
        for storage in _storages((args, kwargs)):
            self._remember(storage)
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if self._remember(storage):
                self._live[storage._cdata] = storage.nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return result

    def _remember(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is new to the watch."""
        key = storage._cdata
        if key in self._known:
            return False
        self._known.add(key)
        weakref.finalize(storage, self._forget, key)
        return True

    def _forget(self, key: int) -> None:
        self._known.discard(key)
        self._live.pop(key, None)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def copy_bytes_per_s(device: torch.device, timer: Callable[[], float] = time.perf_counter) -> float:
    """Bytes a second that a copy reads and writes, far larger than what a processor caches."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / interleaved({"copy": lambda: target.copy_(source)}, 5, timer=timer)["copy"]


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    return 2 * side**3 / interleaved({"product": lambda: matrix @ matrix}, 5)["product"]
