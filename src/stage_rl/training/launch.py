"""How this process was started: alone, or as one of several by torchrun. Free of torch."""

from __future__ import annotations

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """The place of this process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine, and number of its GPU."""


def launch() -> Launch:
    """What torchrun's environment variables say; one process without them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Launch()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Launch(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
