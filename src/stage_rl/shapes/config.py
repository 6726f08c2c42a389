"""What a recipe may say of the shapes world; free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from stage_rl.prompts import MIXES, as_prompts
from stage_rl.prompts.config import TaskRatios
from stage_rl.schema import DetectorConfig, PromptsConfig
from stage_rl.settings import complaint
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.shapes.detector import ShapesDetector


class ShapesPromptsConfig(PromptsConfig):
    """Prompts of the shapes world in a ratio of the GenEval tasks, apart from all held-out ones."""

    mix: Literal["stage", "flow_grpo"] | None = "stage"
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    ratios: TaskRatios | None = None
    """Ratios of one's own, in place of `mix`."""
    num_prompts: int = Field(default=512, ge=1)
    """Prompts of the mix; a task with fewer of its own repeats them evenly."""
    seed: int = Field(default=0, ge=0)
    """Seed of the mix."""

    @model_validator(mode="before")
    @classmethod
    def _ratios_replace_the_mix(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("ratios") is not None and "mix" not in data:
            return {**data, "mix": None}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.mix is None) == (self.ratios is None):
            given = "nothing" if self.mix is None else "both"
            raise complaint("mix", f"{given} of mix and ratios given; write one of them")
        if self.ratios is not None and not any(self.ratios.model_dump().values()):
            raise complaint("ratios", "all are 0; give at least one task a positive ratio")
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order."""
        from stage_rl.shapes.captions import training_records

        ratios = MIXES[self.mix] if self.mix else self.ratios.model_dump() if self.ratios else {}
        return as_prompts(training_records(ratios, self.num_prompts, seed=self.seed))


class ShapesDetectorConfig(DetectorConfig):
    """The small learned detector that comes with the package."""

    def build(self, device: torch.device) -> ShapesDetector:
        """The detector; a copy of the package without its weights is a `WeightsError`."""
        from stage_rl.shapes.detector import ShapesDetector

        return ShapesDetector.load(device)
