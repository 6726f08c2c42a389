"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Books the time since the last lap under time/NAME."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[f"time/{name}"] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """The laps, and time/step_s from the start to the last of them."""
        return self.laps | {"time/step_s": self._last - self._started}
