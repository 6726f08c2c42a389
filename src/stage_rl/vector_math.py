"""Square roots, exponentials and their like on a processor: the same in every process.

MKL looks for the kernel of such a function when it is first called. Where two threads make that
first call at once, one of them may compute its half with a kernel of half the digits, once, and
without a word (https://github.com/pytorch/pytorch/issues/188792, in oneMKL before 2025.0): some
processes had a rotary table that was off in its fourth digit, and drew other images.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"),
    *("log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"),
)
"""Those that torch has MKL compute (ATen/cpu/vml.h)."""


def choose_kernels() -> None:
    """Calls each function once, on one number and so in one thread, in both dtypes MKL has."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(number)
