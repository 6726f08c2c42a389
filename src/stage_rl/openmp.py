"""How the threads of a processor wait for each other, and whether others use it.

Torch's parallel regions are short. A thread that is done spins, because the next region is near;
but where another process holds the core of the thread that all wait for, the spinning takes the
time in which that one could run. So while others use the cores, threads sleep at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import MutableMapping
from pathlib import Path

BLOCK_TIME = {"KMP_BLOCKTIME": "1"}
"""Of LLVM's and Intel's OpenMP, in milliseconds; their own is 200."""

LOAD = Path("/proc/loadavg")
"""Its fourth field is running/all threads of the system."""
LOOKS, LOOK_EVERY_S = 4, 0.005

CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", *BLOCK_TIME)


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets how long threads of LLVM's and Intel's OpenMP spin, unless the user has said how threads
    wait; call it before torch loads.

    GNU's spins for a few milliseconds by itself, and `sleep_beside_others` does more for it than
    any `GOMP_SPINCOUNT`.
    """
    if not any(name in environment for name in CHOSEN_BY_USER):
        environment.update(BLOCK_TIME)


_parked: threading.Event | None = None
"""Ends the team that waits; None while there is none."""
_others = 0
"""Threads that others ran when `sleep_beside_others` found the cores crowded."""


def sleep_beside_others(threads: int) -> bool:
    """Lets the threads of torch sleep at once where they wait, while others use the cores, and spin
    when they are alone again, unless the user has said how they wait. Returns whether they sleep.

    GNU's OpenMP hardly spins while it has more threads than cores, and a second team that does
    nothing makes them more. No number depends on it.
    """
    global _parked, _others
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return False
    others = busy_others() if 1 < threads <= num_cores() else 0
    crowded = others > num_cores() - threads >= 0
    _others = others if crowded else 0
    if crowded and _parked is None:
        _parked = threading.Event()
        threading.Thread(target=_park, args=(_parked,), name="parked", daemon=True).start()
    elif not crowded and _parked is not None:
        _parked.set()
        _parked = None
    return crowded


def threads_beside_others(threads: int) -> int:
    """Of so many threads those that have a core of their own beside what `sleep_beside_others`
    found, at least one: for work whose numbers do not depend on how many threads do it.
    """
    return max(1, min(threads, num_cores() - _others))


def _park(released: threading.Event) -> None:
    import torch  # how threads wait is set before it loads

    torch.zeros(2**20).add_(1)  # large enough for all threads, so this one has a team of its own
    released.wait()


def overcommitment(threads: int) -> str | None:
    """What to say where others use the cores that so many threads need; else None."""
    cores = num_cores()
    if threads > cores:
        return f"{threads} threads on {cores} cores, so steps take longer; set OMP_NUM_THREADS"
    others = busy_others()
    if others + threads <= cores:
        return None
    return f"{others} other threads run beside {threads} on {cores} cores, so steps take longer"


def busy_others() -> int:
    """Threads of others that run now, the fewest of some looks; by the load of the last minute
    where the system does not say.
    """
    try:
        fewest = _running()
        for _ in range(LOOKS - 1):
            if fewest > 0:
                time.sleep(LOOK_EVERY_S)
                fewest = min(fewest, _running())
        return max(fewest, 0)
    except (OSError, ValueError, IndexError):
        # The load is this process's own start as well, part of one core.
        return int(os.getloadavg()[0] + 0.25) if hasattr(os, "getloadavg") else 0


def _running() -> int:
    """Threads of the system that run now, without this one."""
    return int(LOAD.read_text().split()[3].partition("/")[0]) - 1


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
