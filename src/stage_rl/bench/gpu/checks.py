"""What a check of the acceptance run is, and the sizes that it runs at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import stage_rl
from stage_rl.bench.base import BenchResult
from stage_rl.bench.models import TEXT, prompts_of
from stage_rl.distributed import pick_device
from stage_rl.types import Prompt

Checks = Mapping[str, Callable[[], BenchResult]]
"""By name and in order."""


@dataclass(frozen=True)
class Sizes:
    """How large the checks of a part are; tests run smaller ones on a CPU."""

    small: str = "janus-1b"
    large: str = "janus-7b"
    num_prompts: int = 8
    group_size: int = 8
    rounds: int = 2
    num_lengths: int = 640
    """Lengths of the cache that the kernels are tried at."""
    overrides: str = ""
    """Further settings of every training step."""
    tests: Path = Path(stage_rl.__file__).parents[2] / "tests"
    """The folder whose tests of a GPU are run."""

    @property
    def device(self) -> torch.device:
        return pick_device("auto")

    def prompts(self, model: str) -> list[Prompt]:
        """As long as those of GenEval."""
        return prompts_of(model, self.num_prompts)

    @property
    def short_prompts(self) -> list[Prompt]:
        return [Prompt(TEXT, index) for index in range(self.num_prompts)]
