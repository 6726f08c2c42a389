"""What a recipe says of the GenEval prompts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from stage_rl.prompts.files import as_prompts, load_prompts
from stage_rl.prompts.geneval import GENEVAL, geneval_prompts
from stage_rl.prompts.mix import MIXES, training_mix
from stage_rl.schema import NonNegative, PromptsConfig
from stage_rl.settings import Settings, complaint
from stage_rl.types import Prompt


class TaskRatios(Settings):
    """How many prompts of each task, in proportion."""

    single_object: NonNegative = 0.0
    two_object: NonNegative = 0.0
    counting: NonNegative = 0.0
    colors: NonNegative = 0.0
    position: NonNegative = 0.0
    color_attr: NonNegative = 0.0


class GenEvalPromptsConfig(PromptsConfig):
    """GenEval training prompts, built in a ratio of tasks or read from a file."""

    mix: Literal["stage", "flow_grpo"] | None = None
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    ratios: TaskRatios | None = None
    """Ratios of one's own, in place of `mix`."""
    path: str | None = None
    """A file in place of a mix: .jsonl with GenEval metadata, or one prompt per line."""
    num_prompts: int = Field(default=50_000, ge=1)
    """Prompts of a mix; no evaluation prompt is among them."""
    seed: int = Field(default=0, ge=0)
    """Seed of a mix."""

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
        """The prompts; a file with a fault is an `InputError`."""
        if self.path is not None:
            return load_prompts(self.path, classes=GENEVAL.classes, colors=GENEVAL.colors)
        ratios = MIXES[self.mix] if self.mix else self.ratios.model_dump() if self.ratios else {}
        evaluation = {record["prompt"] for record in geneval_prompts()}
        return as_prompts(
            training_mix(ratios, self.num_prompts, seed=self.seed, exclude=evaluation)
        )
