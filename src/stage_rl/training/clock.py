"""Where the time and the memory of a step go."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Clock:
    """Seconds, and on a GPU the peak of memory, since the last lap, by name."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to time/NAME; NAME ends in _s. On a GPU also the peak of
        the memory, under memory/ and the name with _gib.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
            peak, key = torch.cuda.max_memory_allocated(), f"memory/{name.removesuffix('_s')}_gib"
            self.laps[key] = max(peak / 2**30, self.laps.get(key, 0.0))
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """The laps, time/step_s from the start to the last of them, and without a GPU the peak of
        the process so far, memory/process_gib.
        """
        numbers = self.laps | {"time/step_s": self._last - self._started}
        if not self._on_gpu:
            numbers["memory/process_gib"] = process_peak_bytes() / 2**30
        return numbers


def process_peak_bytes() -> int:
    """The most memory that the process held at one time."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
