"""What a recipe may say of the shapes world; free of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from stage_rl.prompts import MIXES, as_prompts, load_prompts
from stage_rl.prompts.config import TaskRatios
from stage_rl.schema import DetectorConfig, PromptsConfig
from stage_rl.settings import complaint
from stage_rl.types import Prompt

if TYPE_CHECKING:
    import torch

    from stage_rl.shapes.detector import ShapesDetector


class ShapesPromptsConfig(PromptsConfig):
    """Prompts of the shapes world, in a ratio of the GenEval tasks or read from a file."""

    mix: Literal["stage", "flow_grpo"] | None = "stage"
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    ratios: TaskRatios | None = None
    """Ratios of one's own, in place of `mix`."""
    path: str | None = None
    """A file in place of a mix: .jsonl with GenEval metadata, or one prompt per line."""
    num_prompts: int = Field(default=512, ge=1)
    """Prompts of a mix, apart from all held-out ones; a task with fewer repeats them evenly."""
    seed: int = Field(default=0, ge=0)
    """Seed of a mix."""

    @model_validator(mode="before")
    @classmethod
    def _another_source_replaces_the_mix(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mix" in data:
            return data
        others = (data.get("ratios"), data.get("path"))
        return data if others == (None, None) else {**data, "mix": None}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = {"mix": self.mix, "ratios": self.ratios, "path": self.path}
        given = [key for key, value in sources.items() if value is not None]
        if len(given) != 1:
            text = f"{' and '.join(given) or 'nothing'} given; write one of mix, ratios, path"
            raise complaint(given[-1] if given else "mix", text)
        if self.ratios is not None and not any(self.ratios.model_dump().values()):
            raise complaint("ratios", "all are 0; give at least one task a positive ratio")
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order; a file with a fault is an `InputError`."""
        from stage_rl.shapes.captions import VOCABULARY, training_records

        if self.path is not None:
            return load_prompts(self.path, classes=VOCABULARY.classes, colors=VOCABULARY.colors)
        ratios = MIXES[self.mix] if self.mix else self.ratios.model_dump() if self.ratios else {}
        return as_prompts(training_records(ratios, self.num_prompts, seed=self.seed))


class ShapesDetectorConfig(DetectorConfig):
    """The small learned detector that comes with the package."""

    def build(self, device: torch.device) -> ShapesDetector:
        """The detector; a copy of the package without its weights is a `WeightsError`."""
        from stage_rl.shapes.detector import ShapesDetector

        return ShapesDetector.load(device)
