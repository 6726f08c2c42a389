"""The other prompt sets: T2I-R1, T2I-CompBench, written text, DrawBench, HPS, and one's own files.

What is wrong in a file of a set is an `InputError` of its `build`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from stage_rl.errors import InputError
from stage_rl.prompts.files import (
    OneSourceConfig,
    PromptsConfig,
    Record,
    as_prompts,
    drop_none,
    known,
    read_json,
    read_lines,
    read_prompts,
    read_records,
    text_of,
    whole,
    word,
)
from stage_rl.prompts.geneval import NUMBERS, validate_metadata, with_article
from stage_rl.types import Prompt

# T2I-R1: prompts with their nouns, attributes, relations and counts.

TaskType = Literal["color", "shape", "texture", "spatial", "numeracy", "object", "non", "complex"]

TASK_TYPES: tuple[TaskType, ...] = get_args(TaskType)

NEEDED = {"spatial": "spatial_info", "numeracy": "numeracy_info"}
"""What a task type cannot be judged without."""

ANNOTATIONS = {
    "nouns": "names",
    "attr_nouns": "names",
    "spatial_info": "",
    "numeracy_info": "{'obj_name': ..., 'num': ...}",
}
"""Keys that the built-in rewards read, and what those that hold a list hold."""


class T2IR1PromptsConfig(PromptsConfig):
    """The T2I-R1 training set, with nouns, attributes, relations and counts.

    github.com/CaraJ7/T2I-R1, data/geneval_and_t2i_data_final.json (JSON lines in spite of its
    name).
    """

    path: str
    """The published file, JSON lines."""
    task_types: tuple[TaskType, ...] = Field(default=TASK_TYPES, min_length=1)
    """Which prompts to take, by their task_type."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered by their line."""
        prompts: list[Prompt] = []
        for number, (where, given) in enumerate(read_records(Path(self.path))):
            record = validate_annotations(given, where)
            text = text_of(record, where)
            kind = known(record.get("task_type"), TASK_TYPES, f"{where}: task_type")
            for key in ("nouns", NEEDED.get(kind, "nouns")):
                if not record.get(key):
                    raise InputError(f"{where}: {key}: a {kind} prompt needs it; write it")
            if kind in self.task_types:
                prompts.append(Prompt(text, number, record))
        if not prompts:
            raise InputError(f"{self.path}: no prompt of {', '.join(self.task_types)}")
        return tuple(prompts)


def validate_annotations(record: Mapping[str, Any], where: str) -> Record:
    """The annotations a record has, ready to judge by: None dropped, counts as whole numbers.

    They are nouns, attr_nouns, spatial_info (obj1, obj2, locality) and numeracy_info (a list of
    obj_name, num); other keys are kept. A fault is an `InputError`.
    """
    cleaned = drop_none(record)
    for key, items in ANNOTATIONS.items():
        place, value = f"{where}: {key}", cleaned.get(key)
        if value is None:
            continue
        if items and (not isinstance(value, list) or not value):
            raise InputError(f"{place}: {value!r} is not a list of {items}")
        if key == "spatial_info":
            _check_mapping(value, ("obj1", "obj2", "locality"), place)
        elif key == "numeracy_info":
            for i, one in enumerate(value):
                _check_mapping(one, ("obj_name", "num"), f"{place}.{i}")
        else:
            cleaned[key] = [word(one, f"{place}.{i}") for i, one in enumerate(value)]
    return cleaned


def _check_mapping(value: Any, keys: tuple[str, ...], where: str) -> None:
    """Checks that a mapping has these keys; makes `num` a whole number, strips the names."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: {value!r} is not a mapping of {', '.join(keys)}")
    for key in value:
        known(key, keys, f"{where}: key")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: {key} is missing; write it")
        place = f"{where}.{key}"
        value[key] = (
            whole(value[key], place, minimum=1) if key == "num" else word(value[key], place)
        )


# T2I-CompBench: the validation prompts with what their text says: nouns, relations, counts.

Category = Literal[
    "color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"
]

CATEGORIES: tuple[Category, ...] = get_args(Category)

LOCALITIES = (
    *("on side of", "next to", "near", "on the left of", "on the right of"),
    *("on the bottom of", "on the top of", "on top of"),
)
"""Relations in the plane; the published evaluator takes the first of them that a prompt has."""

DEPTH_LOCALITIES = ("in front of", "behind", "hidden by")

COUNTS = {"a": 1, "an": 1, **{name: place for place, name in enumerate(NUMBERS[:9]) if place}}

NOUN_LIST = "new_objects.txt"
"""The singular and plural of the counted nouns."""


class T2ICompBenchPromptsConfig(PromptsConfig):
    """The T2I-CompBench validation prompts, with what their text says.

    github.com/Karine-Huang/T2I-CompBench, examples/dataset.
    """

    path: str
    """Folder of the published files: CATEGORY_val.txt, new_objects.txt."""
    categories: tuple[Category, ...] = Field(default=CATEGORIES, min_length=1)
    """Which categories to take, in this order."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, category by category.

        Metadata: category and, where the text gives them, nouns, attr_nouns, spatial_info,
        numeracy_info, and for complex prompts complex_part (spatial, action or all).
        """
        folder = Path(self.path)
        singulars = _read_nouns(folder / NOUN_LIST) if "numeracy" in self.categories else {}
        parts: dict[str, str] = {}
        for part in ("spatial", "action") if "complex" in self.categories else ():
            lines = read_lines(folder / f"complex_val_{part}.txt")
            parts |= {_sentence(text): part for _, text in lines}
        return as_prompts(
            {
                "prompt": text,
                "category": category,
                **_annotations(category, text, where, singulars, parts),
            }
            for category in self.categories
            for where, text in read_lines(folder / f"{category}_val.txt")
        )


def _annotations(
    category: str, text: str, where: str, singulars: Mapping[str, str], parts: Mapping[str, str]
) -> dict[str, Any]:
    """What a prompt's text says, in the keys that its category is judged by."""
    if category in ("spatial", "3d_spatial"):
        localities = LOCALITIES if category == "spatial" else DEPTH_LOCALITIES
        if relation := _relation(text, localities):
            return relation
        hint = f"write THING RELATION THING ({', '.join(localities)})"
        raise InputError(f"{where}: no relation in {text!r}; {hint}")
    if category == "numeracy":
        pairs = itertools.pairwise(re.findall(r"[a-z]+", text.lower()))
        counted = [(singulars[b], COUNTS[a]) for a, b in pairs if a in COUNTS and b in singulars]
        if not counted:
            hint = "add the noun there"
            raise InputError(f"{where}: no counted noun of {NOUN_LIST} in {text!r}; {hint}")
        counts = [{"obj_name": name, "num": count} for name, count in counted]
        return {"nouns": [name for name, _ in counted], "numeracy_info": counts}
    if category == "non_spatial":
        return {}
    phrases = noun_phrases(text)
    if not phrases:
        raise InputError(f"{where}: no noun phrase in {text!r}; write what is to be seen")
    if category != "complex":
        return {"attr_nouns": phrases}
    part = parts.get(_sentence(text), "all")
    return {"attr_nouns": phrases, "complex_part": part, **_relation(text, LOCALITIES)}


def _read_nouns(path: Path) -> dict[str, str]:
    """Singular by each of its forms, from lines `singular - plural`."""
    singulars: dict[str, str] = {}
    for where, line in read_lines(path):
        singular, dash, plural = (part.strip() for part in line.partition(" - "))
        if not (singular and dash and plural):
            raise InputError(f"{where}: {line!r} is not a pair of nouns; write 'mouse - mice'")
        singulars |= {singular: singular, plural: singular}
    return singulars


def _relation(text: str, localities: Collection[str]) -> dict[str, Any]:
    """The two things of the first relation that a text has, by their head nouns; else nothing."""
    for locality in localities:
        before, _, after = _sentence(text).partition(f" {locality} ")
        left, right = noun_phrases(before), noun_phrases(after)
        if left and right:
            things = [left[-1].split()[-1], right[0].split()[-1]]
            info = {"obj1": things[0], "obj2": things[1], "locality": locality}
            return {"nouns": things, "spatial_info": info}
    return {}


def _sentence(text: str) -> str:
    """A prompt in small letters up to its first full stop, as the published lists compare them."""
    return text.lower().partition(".")[0].strip()


# Noun phrases by closed word lists. T2I-CompBench takes its phrases from a statistical parser whose
# model no package index has. These rules agree with what such a parser finds on prompts of the kind
# "a green bench and a blue bowl"; in longer sentences they can differ, and the benchmark says so.


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


MAX_PHRASES = 8

LEFT_OUT = frozenset({"top", "the top", "the side", "the left", "the right", "the bottom"})
"""Parts of a relation, which are no things to be seen."""

DETERMINERS = _words(
    "a an the this that these those its their his her my our your some each every both"
)

BREAKS = _words(
    "and or but while as than with without of in on at to from by for near next onto into over",
    "under above below behind beside between against across along around through inside",
    "outside beneath underneath among upon off up down beyond toward towards within amongst",
    "alongside throughout atop during after before amid past",
    "is are was were be been being has have had do does did can could will would should may",
    "might it they he she there here which who where when whose what not just also very so",
    "together too front back",
)
"""Words that are in no noun phrase: prepositions, conjunctions, auxiliaries, pronouns, adverbs."""

VERBS = _words(
    "sat sits sit stood stands stand shone shines hung hangs hang flew flies fly lay lies lie",
    "held holds hold ran runs run swam swims sped blew blows swung rose rises fell falls led",
    "grew grows sank made makes make cast casts cut gave gives give took takes rests rest",
    "leans lean drives drove rode rides met sleeps slept kept keeps wore wears sang spun",
    "stung clung swept spread spreads contrasts contrast complements complement provide",
    "provides adds add creates create cover covers adorn adorns fills fill surrounds looks",
)
"""Finite verbs that no ending gives away."""

PHRASE_NOUNS = _words(
    "painting building ceiling ring earring string spring wing king swing railing bedding",
    "clothing lighting icing thing topping frosting stuffing wrapping pudding morning evening",
    "butterfly family jelly belly dragonfly assembly seaweed",
)
"""Nouns that end like a verb or an adverb."""


def noun_phrases(text: str) -> list[str]:
    """At most eight noun phrases in small letters, in order: ["a green bench", "a blue bowl"]."""
    phrases: list[list[str]] = []
    for clause in re.split(r"[.,;:!?]+", text.lower()):
        words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", clause)
        current: list[str] = []
        for spoken, after in itertools.zip_longest(words, words[1:], fillvalue=""):
            outside = _is_outside(spoken, after, open_phrase=bool(current))
            if outside or spoken in DETERMINERS:
                phrases.append(current)
                current = []
            if not outside:
                current.append(spoken)
        phrases.append(current)
    # A determiner alone, as in "this is", names nothing.
    found = [" ".join(phrase) for phrase in phrases if phrase]
    return [one for one in found if one not in DETERMINERS | LEFT_OUT][:MAX_PHRASES]


def _is_outside(spoken: str, after: str, *, open_phrase: bool) -> bool:
    """Whether a word ends a phrase: a closed-class word, an adverb, or a verb."""
    if spoken in BREAKS:
        return True
    if spoken in VERBS:
        # "a blue rose and ..." and "a trophy stand" are things.
        return open_phrase and after not in ("", "and", "or", "but")
    thing_follows = after and after not in BREAKS and after not in DETERMINERS
    ending = len(spoken) > 4 and spoken.endswith(("ed", "ly", "ing"))
    return ending and spoken not in PHRASE_NOUNS and not thing_follows


# Prompts that ask for written text: the text in quotes is the target of the OCR reward.

LEVELS = (("Easy", 5), ("Medium", 10))
"""Longest target of a level, in characters without spaces; longer ones are Hard."""

THINGS = ("sign", "poster", "book cover", "mug", "neon sign", "shop window", "banner", "T-shirt")

WORDS = (
    *("open", "sale", "coffee", "welcome", "exit", "music", "garden", "north", "hello", "summer"),
    *("bakery", "library", "pizza", "museum", "station", "forever", "stage", "market", "ocean"),
)


class OcrPromptsConfig(OneSourceConfig):
    """Prompts that ask for written text, each with one text in double quotes."""

    sources = ("path", "synthetic")

    path: str | None = None
    """Plain text with one prompt per line, JSON lines, or the published length buckets."""
    synthetic: int | None = Field(default=None, gt=0, le=1_000_000)
    """So many made-up prompts in place of a file, for trying things out."""
    seed: int = Field(default=0, ge=0)
    """Seed of made-up prompts."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their target and level.

        A CSV file has the columns prompt_raw and target_text, as the published length buckets
        (github.com/yifan123/flow_grpo, dataset/ocr).
        """
        if self.path is None:
            records = _made_up(self.synthetic or 0, self.seed)
        else:
            records = _quoting(Path(self.path))
        return as_prompts({**record, "level": _level(record["target"])} for record in records)


def _made_up(num_prompts: int, seed: int) -> Iterator[Record]:
    """Records with one or two common words."""
    rng = np.random.default_rng(seed)
    for _ in range(num_prompts):
        chosen = rng.choice(WORDS, size=int(rng.integers(1, 3)), replace=False)
        target = " ".join(chosen).title()
        text = f'{with_article(str(rng.choice(THINGS)))} that says "{target}"'
        yield {"prompt": text[0].upper() + text[1:], "synthetic": True, "target": target}


def _quoting(path: Path) -> Iterator[Record]:
    """Records of a file with what their prompts quote; of a table, with nothing else."""
    is_table = path.suffix == ".csv"
    for where, text, record in read_prompts(path, "prompt_raw" if is_table else "prompt"):
        quoted = _target_of(text, where)
        if is_table and (target := record.get("target_text")) != quoted.strip():
            raise InputError(
                f"{where}: target_text is {target!r}, but the prompt quotes {quoted!r}"
            )
        yield {**({} if is_table else record), "prompt": text, "target": quoted}


def _target_of(text: str, where: str) -> str:
    """What stands between the two double quotes of a prompt."""
    parts = text.split('"')
    if len(parts) != 3:
        raise InputError(f'{where}: {len(parts) - 1} double quotes; write one text in "quotes"')
    if not parts[1].replace(" ", ""):
        raise InputError(f"{where}: the quotes are empty; write the text to be drawn")
    return parts[1]


def _level(target: str) -> str:
    length = len(target.replace(" ", ""))
    return next((level for level, longest in LEVELS if length <= longest), "Hard")


# Sets without rules of their own.


class DrawBenchPromptsConfig(PromptsConfig):
    """The DrawBench prompts."""

    path: str
    """CSV with the columns Prompts and Category."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their category."""
        records: list[Record] = []
        for where, text, row in read_prompts(Path(self.path), "Prompts"):
            if "Category" not in row:
                raise InputError(f"{where}: empty Category; write one")
            records.append({"prompt": text, "category": row["Category"]})
        return as_prompts(records)


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The files of the HPSv2 benchmark, each a JSON array of 800 prompts."""


class HpsPromptsConfig(PromptsConfig):
    """The prompts of the HPSv2 benchmark."""

    path: str
    """Folder with anime, concept-art, paintings and photo.json, or one such file."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their style."""
        path = Path(self.path)
        files = [path / f"{style}.json" for style in HPS_STYLES] if path.is_dir() else [path]
        records: list[Record] = []
        for file in files:
            for where, value in read_json(file):
                text = text_of(value if isinstance(value, dict) else {"prompt": value}, where)
                records.append({"prompt": text, "style": file.stem})
        return as_prompts(records)


class FilePromptsConfig(PromptsConfig):
    """One's own prompts from a file."""

    path: str
    """Plain text with one prompt per line, .jsonl (or .json) records, or .csv."""
    column: str = Field(default="prompt", min_length=1)
    """Key or column of the text; the others become metadata."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts; what the built-in rewards read of their metadata is checked.

        That is include, exclude and tag, nouns, attr_nouns, spatial_info and numeracy_info.
        """
        prompts: list[Prompt] = []
        for where, text, given in read_prompts(Path(self.path), self.column):
            record = validate_annotations(given, where)
            if "include" in record:
                record = validate_metadata(record, where)
            prompts.append(Prompt(text, len(prompts), record, where))
        return tuple(prompts)
