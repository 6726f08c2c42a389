"""Prompt sets: builders, files, and the order in which a run takes them."""

from stage_rl.prompts.files import as_prompts, load_prompts, validate_metadata
from stage_rl.prompts.geneval import (
    CLASSES,
    COLORS,
    GENEVAL,
    RELATIONS,
    TASKS,
    Record,
    Vocabulary,
    color_attr_record,
    colors_record,
    counting_record,
    geneval_prompts,
    position_record,
    single_object_record,
    two_object_record,
)
from stage_rl.prompts.mix import MIXES, training_mix
from stage_rl.prompts.order import prompt_order, prompts_of_step

__all__ = [
    "CLASSES",
    "COLORS",
    "GENEVAL",
    "MIXES",
    "RELATIONS",
    "TASKS",
    "Record",
    "Vocabulary",
    "as_prompts",
    "color_attr_record",
    "colors_record",
    "counting_record",
    "geneval_prompts",
    "load_prompts",
    "position_record",
    "prompt_order",
    "prompts_of_step",
    "single_object_record",
    "training_mix",
    "two_object_record",
    "validate_metadata",
]
