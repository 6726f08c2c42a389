"""Components by short built-in name or by `module:Class`."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from stage_rl.errors import RecipeError

BUILT_IN = {
    "policy": {"janus": "stage_rl.policies.config:JanusConfig"},
    "prompts": {
        "geneval": "stage_rl.prompts:GenEvalPromptsConfig",
        "shapes": "stage_rl.shapes.config:ShapesPromptsConfig",
    },
    "reward": {"geneval": "stage_rl.rewards.config:GenEvalRewardConfig"},
    "detector": {"shapes": "stage_rl.shapes.config:ShapesDetectorConfig"},
}


def resolve(family: str, name: str) -> Any:
    """The class behind a name of a family (policy, prompts, reward, detector)."""
    target = BUILT_IN[family].get(name, name)
    module_name, _, class_name = target.partition(":")
    if not class_name:
        near = difflib.get_close_matches(name, BUILT_IN[family], n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(BUILT_IN[family])}"
        raise RecipeError(f"{family}: unknown kind '{name}'; {hint}, or module:Class")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise RecipeError(f"{family}: cannot import '{module_name}': {error}") from error
    except AttributeError as error:
        raise RecipeError(f"{family}: '{module_name}' has no '{class_name}'") from error
