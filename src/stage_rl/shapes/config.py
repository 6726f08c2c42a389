"""What a recipe may say of the shapes world; free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from stage_rl.prompts import Record, Vocabulary
from stage_rl.prompts.config import MixConfig
from stage_rl.schema import Count, DetectorConfig

if TYPE_CHECKING:
    import torch

    from stage_rl.shapes.detector import ShapesDetector


class ShapesPromptsConfig(MixConfig):
    """Prompts of the shapes world, in a ratio of the GenEval tasks or read from a file."""

    mix: Literal["stage", "flow_grpo"] | None = "stage"
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    num_prompts: Count = 512
    """Prompts of a mix, apart from all held-out ones; a task with fewer repeats them evenly."""

    @model_validator(mode="before")
    @classmethod
    def _another_source_replaces_the_mix(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mix" in data:
            return data
        others = (data.get("ratios"), data.get("path"))
        return data if others == (None, None) else {**data, "mix": None}

    def vocabulary(self) -> Vocabulary:
        """The shapes and their colours."""
        from stage_rl.shapes.captions import VOCABULARY

        return VOCABULARY

    def mixed(self, ratios: Mapping[str, float]) -> list[Record]:
        """Records apart from all held-out ones."""
        from stage_rl.shapes.captions import training_records

        return training_records(ratios, self.num_prompts, seed=self.seed)


class ShapesDetectorConfig(DetectorConfig):
    """The small learned detector that comes with the package."""

    def build(self, device: torch.device) -> ShapesDetector:
        """The detector; a copy of the package without its weights is a `WeightsError`."""
        from stage_rl.shapes.detector import ShapesDetector

        return ShapesDetector.load(device)
