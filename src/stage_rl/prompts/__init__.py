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
from stage_rl.prompts.leakage import Leak, find_leaks
from stage_rl.prompts.mix import MIXES, evaluation_texts, training_mix
from stage_rl.prompts.ocr import load_ocr
from stage_rl.prompts.order import prompt_order, prompts_of_step
from stage_rl.prompts.sets import load_drawbench, load_file, load_hps
from stage_rl.prompts.t2i_compbench import load_t2i_compbench
from stage_rl.prompts.t2i_r1 import load_t2i_r1

__all__ = [
    "CLASSES",
    "COLORS",
    "GENEVAL",
    "MIXES",
    "RELATIONS",
    "TASKS",
    "Leak",
    "Record",
    "Vocabulary",
    "as_prompts",
    "color_attr_record",
    "colors_record",
    "counting_record",
    "evaluation_texts",
    "find_leaks",
    "geneval_prompts",
    "load_drawbench",
    "load_file",
    "load_hps",
    "load_ocr",
    "load_prompts",
    "load_t2i_compbench",
    "load_t2i_r1",
    "position_record",
    "prompt_order",
    "prompts_of_step",
    "single_object_record",
    "training_mix",
    "two_object_record",
    "validate_metadata",
]
