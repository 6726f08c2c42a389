"""A function of static buffers, captured in one CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

CALLS_BEFORE_CAPTURE = 2
"""Calls that run as they are: they compile the kernels and allocate what a capture must not."""


class Captured:
    """Calls a function, and after its first calls replays it from a CUDA graph.

    The function takes nothing, returns nothing, and reads and writes tensors whose addresses stay;
    nothing in it waits for the GPU.
    """

    def __init__(self, function: Callable[[], None]):
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        """Does the work of the function once."""
        if self._graph is None and self._calls < CALLS_BEFORE_CAPTURE:
            self._calls += 1
            self._function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as rewards, may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._function()
        self._graph.replay()
