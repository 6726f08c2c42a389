"""Memory that the C library keeps for the next step."""

from __future__ import annotations

import ctypes
import sys

# Names and values of malloc.h in the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
LARGEST_KEPT = 32 * 2**20
"""Bytes of the largest block that comes from the heap, as many as the library allows."""
MOST_KEPT = 2**30
"""Bytes of free memory above which the heap is cut."""


def keep_freed_memory() -> bool:
    """Stops the C library from giving freed memory back at once; whether it can.

    A step on a CPU frees and takes the same tensors again and again. Each time, the system would
    have to clear their pages anew, which takes time. Only the GNU library can be told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT), mallopt(_M_TRIM_THRESHOLD, MOST_KEPT)
    return all(kept)
