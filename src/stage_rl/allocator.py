"""How torch takes the memory of a GPU: in segments that grow, unless the user says otherwise."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

CHOSEN_BY_USER = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets it before a GPU is used first; later it changes nothing.

    Else what a phase frees is in pieces that the next one cannot use (`rollout.release_cache`).
    """
    if not any(name in environment for name in CHOSEN_BY_USER):
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
