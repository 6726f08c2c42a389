"""What every benchmark shares: its result, fair timing and honest peak memory.

A benchmark is a module with `BAR`, the bar in words, and `run(**options) -> BenchResult`, whose
keyword arguments are its command-line options.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stage_rl.errors import InputError
from stage_rl.rollout.attention import BLOCK
from stage_rl.rollout.decoder import Decoder

Setting = int | float | str | tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True)
class BenchResult:
    """What one benchmark measured."""

    name: str
    headline: str
    """The ratio and what it compares, in words."""
    bar: str
    reached: bool | None
    """Whether the bar is reached; None where it is not set for these sizes."""
    settings: Mapping[str, Setting]
    measures: Mapping[str, float]
    """Figures by name; durations and sizes carry their unit in it."""
    table: tuple[str, ...] = ()
    """Lines to print above the one line; their figures are among the measures."""

    def line(self) -> str:
        """The result as one line."""
        verdict = {True: "reached", False: "MISSED", None: "not set for these sizes"}[self.reached]
        return f"{self.name}: {self.headline}; bar {self.bar}: {verdict}"

    def to_dict(self) -> dict[str, Any]:
        """The result and the machine, ready for JSON."""
        return {
            "name": self.name,
            "headline": self.headline,
            "bar": self.bar,
            "reached": self.reached,
            "settings": dict(self.settings),
            "measures": dict(self.measures),
            "machine": machine(),
        }


def at_least(least: int, **options: int | tuple[int, ...]) -> None:
    """Raises InputError for the first option below `least`; of a tuple, every item counts."""
    for name, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            if number < least:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option}: {number} is out of range; write at least {least}")


def check_guided(guidance_scale: float) -> None:
    """Raises InputError for a scale at which transformers' generate draws no unconditional rows."""
    if guidance_scale <= 1:
        raise InputError(
            f"--guidance-scale: transformers' generate needs more than 1, not {guidance_scale}; "
            "write 3"
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


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    calls: int = 1,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds per call of each function over `rounds`, after one call each to warm up.

    Each round times every function once, so a change of load falls on all of them; a function far
    below a millisecond is timed over several `calls`. For work on one CPU thread
    `timer=time.thread_time` counts what the thread ran, not what it waited for others: wall time on
    a busy machine stretches the longer function more and so flatters the shorter.
    """
    assert rounds > 0, rounds
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_of(function, calls, timer) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


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


# What a rollout and a training pass must move and compute, and how fast the machine can.
#
# Symbols of the formulas: R rows, P prompt slots, T image tokens, L layers, D width.


PASSES_OF_A_STEP = 4
"""Forward passes whose work a step does: reference 1, policy 1, its backward pass 2."""


@dataclass(frozen=True)
class Work:
    """The sizes of a rollout."""

    num_images: int
    prompt_slots: int
    num_tokens: int
    guided: bool

    @property
    def num_rows(self) -> int:
        """Rows of the decode."""
        return self.num_images * (2 if self.guided else 1)

    def rollout_bytes(self, decoder: Decoder) -> float:
        """Weights once a token, and of the cache each row's live slots: T P + T (T + 1) / 2."""
        slots = self.num_tokens * self.prompt_slots + self.num_tokens * (self.num_tokens + 1) / 2
        slot_bytes = decoder.cache_shape.row_bytes(BLOCK) / BLOCK
        return self.num_tokens * decoder.step_bytes + self.num_rows * slot_bytes * slots

    def pass_flops(self, decoder: Decoder) -> float:
        """One teacher-forced forward pass: 2 for each weight and slot, and causal attention."""
        num_slots = self.prompt_slots + self.num_tokens - 1
        layers = decoder.layers
        weights = sum(
            part.numel() for x in layers for part in (x.wqkv, x.wo, x.w_gate_up, x.w_down)
        )
        head = sum(weight.numel() for weight, _ in decoder.head_layers)
        heads = decoder.heads
        # Scores and mix, 2 x 2 S^2 D a layer, of which causal attention needs half.
        attention = 2 * num_slots**2 * heads.num_heads * heads.head_dim * len(layers)
        row = 2 * weights * num_slots + 2 * head * self.num_tokens + attention
        return self.num_images * row


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
