"""Components by short built-in name or by `module:Class`."""

from __future__ import annotations

import difflib
import importlib
import re
from typing import Any

from stage_rl.errors import RecipeError

BUILT_IN = {
    "policy": {"janus": "stage_rl.policies.config:JanusConfig"},
    "prompts": {
        "geneval": "stage_rl.prompts.config:GenEvalPromptsConfig",
        "t2i_r1": "stage_rl.prompts.config:T2IR1PromptsConfig",
        "t2i_compbench": "stage_rl.prompts.config:T2ICompBenchPromptsConfig",
        "ocr": "stage_rl.prompts.config:OcrPromptsConfig",
        "drawbench": "stage_rl.prompts.config:DrawBenchPromptsConfig",
        "hps": "stage_rl.prompts.config:HpsPromptsConfig",
        "file": "stage_rl.prompts.config:FilePromptsConfig",
        "shapes": "stage_rl.shapes.config:ShapesPromptsConfig",
    },
    "reward": {
        "geneval": "stage_rl.rewards.config:GenEvalRewardConfig",
        "hps": "stage_rl.rewards.config_scorers:HpsConfig",
        "pickscore": "stage_rl.rewards.config_scorers:PickScoreConfig",
        "clip_score": "stage_rl.rewards.config_scorers:ClipScoreConfig",
        "image_reward": "stage_rl.rewards.config_scorers:ImageRewardConfig",
        "aesthetic": "stage_rl.rewards.config_scorers:AestheticConfig",
        "grounding_dino": "stage_rl.rewards.config_scenes:GroundingDinoRewardConfig",
        "git": "stage_rl.rewards.config_scenes:GitRewardConfig",
        "yes_no": "stage_rl.rewards.config_scenes:YesNoRewardConfig",
        "ocr": "stage_rl.rewards.config_text:OcrRewardConfig",
        "external": "stage_rl.rewards.config_external:ExternalRewardConfig",
        "remote": "stage_rl.rewards.config_remote:RemoteRewardConfig",
        "compbench_attributes": "stage_rl.rewards.config_compbench:AttributesConfig",
        "compbench_spatial": "stage_rl.rewards.config_compbench:PlaneConfig",
        "compbench_depth": "stage_rl.rewards.config_compbench:DepthConfig",
        "compbench_numeracy": "stage_rl.rewards.config_compbench:NumeracyConfig",
        "variety": "stage_rl.rewards.config_compbench:VarietyConfig",
    },
    "detector": {
        "shapes": "stage_rl.shapes.config:ShapesDetectorConfig",
        "mask2former": "stage_rl.rewards.config_detectors:Mask2FormerConfig",
        "grounding_dino": "stage_rl.rewards.config_scenes:GroundingDinoDetectorConfig",
    },
}


def resolve(family: str, name: str) -> Any:
    """The class behind a name of a family (policy, prompts, reward, detector)."""
    target = BUILT_IN[family].get(name, name)
    module_name, _, class_name = target.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        near = difflib.get_close_matches(name, BUILT_IN[family], n=1)
        known = ", ".join(BUILT_IN[family])
        hint = f"did you mean '{near[0]}'?" if near else f"write one of: {known}, or module:Class"
        raise RecipeError(f"unknown {family} kind '{name}'; {hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"cannot import '{module_name}' ({error}); write an importable module:Class"
        ) from error
    # The module may be anyone's, and so may what it raises.
    except Exception as error:
        what = " ".join(str(error).split())
        raise RecipeError(
            f"cannot import '{module_name}' ({type(error).__name__}: {what}); put the module right"
        ) from error
    if not hasattr(module, class_name):
        raise RecipeError(f"'{module_name}' has no '{class_name}'; write the name of a class in it")
    return getattr(module, class_name)


def name_of(family: str, component: type) -> str:
    """The name by which `resolve` finds a class: the short one where there is one."""
    target = f"{component.__module__}:{component.__qualname__}"
    return next((name for name, known in BUILT_IN[family].items() if known == target), target)
