"""What a recipe says of the built-in prompt sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from stage_rl.prompts.files import as_prompts, load_prompts
from stage_rl.prompts.geneval import GENEVAL, Record, Vocabulary
from stage_rl.prompts.mix import MIXES, evaluation_texts, training_mix
from stage_rl.prompts.ocr import load_ocr, synthetic_ocr
from stage_rl.prompts.sets import load_drawbench, load_file, load_hps
from stage_rl.prompts.t2i_compbench import CATEGORIES, load_t2i_compbench
from stage_rl.prompts.t2i_r1 import TASK_TYPES, load_t2i_r1
from stage_rl.schema import Count, NonNegative, PromptsConfig
from stage_rl.settings import Settings, complaint, near_or_all
from stage_rl.types import Prompt


class TaskRatios(Settings):
    """How many prompts of each task, in proportion."""

    single_object: NonNegative = 0.0
    two_object: NonNegative = 0.0
    counting: NonNegative = 0.0
    colors: NonNegative = 0.0
    position: NonNegative = 0.0
    color_attr: NonNegative = 0.0


class OneSourceConfig(PromptsConfig):
    """Base of the prompt sets that come from exactly one of several sources."""

    sources: ClassVar[tuple[str, ...]]
    """The keys of which a recipe writes one."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in self.sources if getattr(self, key) is not None]
        if len(given) != 1:
            text = f"{' and '.join(given) or 'nothing'} given; write one of "
            key = given[-1] if given else self.sources[0]
            raise complaint(key, text + ", ".join(self.sources))
        return self


class MixConfig(OneSourceConfig):
    """Base of the sets in GenEval's wording: a ratio of tasks, or a file."""

    sources = ("mix", "ratios", "path")

    mix: Literal["stage", "flow_grpo"] | None = None
    """Ratios by name: stage is the paper's 0:1:7:1:4:5, flow_grpo is 0:1:5:1:7:3."""
    ratios: TaskRatios | None = None
    """Ratios of one's own, in place of `mix`."""
    path: str | None = None
    """A file in place of a mix: .jsonl with GenEval metadata, or one prompt per line."""
    num_prompts: Count = 50_000
    """Prompts of a mix; no evaluation prompt is among them."""
    seed: int = Field(default=0, ge=0)
    """Seed of a mix."""

    @model_validator(mode="after")
    def _some_ratio(self) -> Self:
        if self.ratios is not None and not any(self.ratios.model_dump().values()):
            raise complaint("ratios", "all are 0; give at least one task a positive ratio")
        return self

    @abstractmethod
    def vocabulary(self) -> Vocabulary:
        """The words that a file may use."""

    @abstractmethod
    def mixed(self, ratios: Mapping[str, float]) -> list[Record]:
        """The records of a mix."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order; a file with a fault is an `InputError`."""
        if self.path is not None:
            words = self.vocabulary()
            return load_prompts(self.path, classes=words.classes, colors=words.colors)
        ratios = MIXES[self.mix] if self.mix else self.ratios.model_dump() if self.ratios else {}
        return as_prompts(self.mixed(ratios))


class GenEvalPromptsConfig(MixConfig):
    """GenEval training prompts, built in a ratio of tasks or read from a file."""

    def vocabulary(self) -> Vocabulary:
        """The 80 classes and 10 colours."""
        return GENEVAL

    def mixed(self, ratios: Mapping[str, float]) -> list[Record]:
        """Records apart from the 553 of the evaluation, in either order of their objects."""
        exclude = evaluation_texts()
        return training_mix(ratios, self.num_prompts, seed=self.seed, exclude=exclude)


class T2IR1PromptsConfig(PromptsConfig):
    """The T2I-R1 training set, with nouns, attributes, relations and counts."""

    path: str
    """The published file, JSON lines."""
    task_types: tuple[str, ...] = TASK_TYPES
    """Which prompts to take, by their task_type."""

    @model_validator(mode="after")
    def _known_types(self) -> Self:
        _all_known("task_types", self.task_types, TASK_TYPES)
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered by their line; a file with a fault is an `InputError`."""
        return load_t2i_r1(self.path, self.task_types)


class T2ICompBenchPromptsConfig(PromptsConfig):
    """The T2I-CompBench validation prompts."""

    path: str
    """Folder of the published files: CATEGORY_val.txt, new_objects.txt."""
    categories: tuple[str, ...] = CATEGORIES
    """Which categories to take, in this order."""

    @model_validator(mode="after")
    def _known_categories(self) -> Self:
        _all_known("categories", self.categories, CATEGORIES)
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, category by category; a file with a fault is an `InputError`."""
        return load_t2i_compbench(self.path, self.categories)


class OcrPromptsConfig(OneSourceConfig):
    """Prompts that ask for written text, each with one text in double quotes."""

    sources = ("path", "synthetic")

    path: str | None = None
    """Plain text with one prompt per line, JSON lines, or the published length buckets."""
    synthetic: Count | None = None
    """So many made-up prompts in place of a file, for trying things out."""
    seed: int = Field(default=0, ge=0)
    """Seed of made-up prompts."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their target; a file with a fault is an `InputError`."""
        if self.path is not None:
            return load_ocr(self.path)
        return synthetic_ocr(self.synthetic or 0, self.seed)


class DrawBenchPromptsConfig(PromptsConfig):
    """The DrawBench prompts."""

    path: str
    """CSV with the columns Prompts and Category."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their category; a file with a fault is an `InputError`."""
        return load_drawbench(self.path)


class HpsPromptsConfig(PromptsConfig):
    """The prompts of the HPSv2 benchmark."""

    path: str
    """Folder with anime, concept-art, paintings and photo.json, or one such file."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their style; a file with a fault is an `InputError`."""
        return load_hps(self.path)


class FilePromptsConfig(PromptsConfig):
    """One's own prompts from a file."""

    path: str
    """Plain text with one prompt per line, .jsonl (or .json) records, or .csv."""
    column: str = Field(default="prompt", min_length=1)
    """Key or column of the text; the others become metadata."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order; a file with a fault is an `InputError`."""
        return load_file(self.path, column=self.column)


def _all_known(key: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if not given:
        raise complaint(key, f"is empty; write some of {', '.join(allowed)}")
    for name in given:
        if name not in allowed:
            raise complaint(key, f"unknown '{name}'; {near_or_all(name, allowed)}")
