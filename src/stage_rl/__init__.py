"""STAGE: stable and generalizable GRPO for autoregressive image generation.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage_rl import algorithm
    from stage_rl.api import evaluate, sample, train
    from stage_rl.config import load_recipe
    from stage_rl.errors import StageError
    from stage_rl.policies.base import Policy, PolicyConfig
    from stage_rl.recipe import Recipe
    from stage_rl.rewards.base import Reward, RewardConfig, Score
    from stage_rl.types import Prompt, Rollout

__all__ = [
    "Policy",
    "PolicyConfig",
    "Prompt",
    "Recipe",
    "Reward",
    "RewardConfig",
    "Rollout",
    "Score",
    "StageError",
    "algorithm",
    "evaluate",
    "load_recipe",
    "sample",
    "train",
]

_HOMES = {
    "Policy": "stage_rl.policies.base",
    "PolicyConfig": "stage_rl.policies.base",
    "Prompt": "stage_rl.types",
    "Recipe": "stage_rl.recipe",
    "Reward": "stage_rl.rewards.base",
    "RewardConfig": "stage_rl.rewards.base",
    "Rollout": "stage_rl.types",
    "Score": "stage_rl.rewards.base",
    "StageError": "stage_rl.errors",
    "evaluate": "stage_rl.api",
    "load_recipe": "stage_rl.config",
    "sample": "stage_rl.api",
    "train": "stage_rl.api",
}


def __getattr__(name: str) -> Any:
    if name == "algorithm":
        return importlib.import_module("stage_rl.algorithm")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'stage_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
