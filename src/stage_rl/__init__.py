"""STAGE: stable and generalizable GRPO for autoregressive image generation.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage_rl import algorithm
    from stage_rl.api import (
        evaluate,
        evaluate_against,
        evaluate_understanding,
        export,
        load,
        sample,
        score,
        train,
    )
    from stage_rl.config import load_recipe
    from stage_rl.errors import StageError
    from stage_rl.evaluation.run import Request
    from stage_rl.policies.base import Policy, PolicyConfig
    from stage_rl.recipe import Recipe
    from stage_rl.rewards.base import Reward, RewardConfig, Score
    from stage_rl.types import Prompt, Rollout

__all__ = [
    "Policy",
    "PolicyConfig",
    "Prompt",
    "Recipe",
    "Request",
    "Reward",
    "RewardConfig",
    "Rollout",
    "Score",
    "StageError",
    "algorithm",
    "evaluate",
    "evaluate_against",
    "evaluate_understanding",
    "export",
    "load",
    "load_recipe",
    "sample",
    "score",
    "train",
]

_HOMES = {
    "api": (
        *("evaluate", "evaluate_against", "evaluate_understanding"),
        *("export", "load", "sample", "score", "train"),
    ),
    "config": ("load_recipe",),
    "errors": ("StageError",),
    "evaluation.run": ("Request",),
    "policies.base": ("Policy", "PolicyConfig"),
    "recipe": ("Recipe",),
    "rewards.base": ("Reward", "RewardConfig", "Score"),
    "types": ("Prompt", "Rollout"),
}


def __getattr__(name: str) -> Any:
    if name == "algorithm":
        return importlib.import_module("stage_rl.algorithm")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"stage_rl.{home}"), name)
    raise AttributeError(f"module 'stage_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
