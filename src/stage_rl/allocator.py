"""How memory is taken: that of a GPU in segments that grow, that of a CPU kept for the next use."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

CHOSEN_BY_USER = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets it before a GPU is used first; later it changes nothing.

    Else what a phase frees is in pieces that the next one cannot use (`rollout.release_cache`).
    """
    if not any(name in environment for name in CHOSEN_BY_USER):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_freed_memory() -> bool:
    """Stops the C library from giving freed memory back at once; whether it can.

    Sampling and training on a CPU free and take the same tensors again and again. Each time, the
    system would have to clear their pages anew, which takes time. Only the GNU library can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # Names and values of malloc.h in the GNU C library. Blocks of up to 32 MiB, the most that it
    # allows, come from the heap, which is cut where more than 1 GiB of it is free.
    trim_threshold, mmap_threshold = -1, -3
    kept = mallopt(mmap_threshold, 32 * 2**20), mallopt(trim_threshold, 2**30)
    return all(kept)
