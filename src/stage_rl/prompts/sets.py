"""The other prompt sets: T2I-R1, T2I-CompBench, written text, DrawBench, HPS, and one's own files.

Each set is its settings and the function that loads it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from stage_rl.errors import InputError
from stage_rl.prompts.files import (
    JSON_ENDINGS,
    OneSourceConfig,
    PromptsConfig,
    Record,
    count_of,
    drop_none,
    known,
    read_json,
    read_lines,
    read_records,
    read_table,
    text_of,
    word,
)
from stage_rl.prompts.geneval import NUMBERS, validate_metadata, with_article
from stage_rl.settings import Count, complaint, near_or_all
from stage_rl.types import Prompt

# T2I-R1: prompts with their nouns, attributes, relations and counts.

TASK_TYPES = ("color", "shape", "texture", "spatial", "numeracy", "object", "non", "complex")

NEEDED = {"spatial": "spatial_info", "numeracy": "numeracy_info"}
"""What a task type cannot be judged without."""


class T2IR1PromptsConfig(PromptsConfig):
    """The T2I-R1 training set, with nouns, attributes, relations and counts."""

    path: str
    """The published file, JSON lines."""
    task_types: tuple[str, ...] = TASK_TYPES
    """Which prompts to take, by their task_type."""

    @model_validator(mode="after")
    def _known_types(self) -> Self:
        _some_of("task_types", self.task_types, TASK_TYPES)
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered by their line; a file with a fault is an `InputError`."""
        return load_t2i_r1(self.path, self.task_types)


def load_t2i_r1(path: str | Path, task_types: Collection[str] = TASK_TYPES) -> tuple[Prompt, ...]:
    """The prompts of some task types, numbered by their line; a fault is an `InputError`.

    github.com/CaraJ7/T2I-R1, data/geneval_and_t2i_data_final.json (JSON lines in spite of its
    name).
    """
    prompts: list[Prompt] = []
    for number, (where, parsed) in enumerate(read_records(Path(path))):
        record = validate_annotations(parsed, where=where)
        text = text_of(record, where)
        kind = known(record.get("task_type"), TASK_TYPES, f"{where}: task_type")
        for key in ("nouns", NEEDED.get(kind, "nouns")):
            if not record.get(key):
                raise InputError(f"{where}: {key}: a {kind} prompt needs it; write it")
        if kind in task_types:
            prompts.append(Prompt(text, number, record))
    if not prompts:
        raise InputError(f"{path}: no prompt of {', '.join(task_types)}")
    return tuple(prompts)


def validate_annotations(record: Mapping[str, Any], *, where: str) -> Record:
    """The annotations a record has, ready to judge by: None dropped, counts as whole numbers.

    They are nouns, attr_nouns, spatial_info (obj1, obj2, locality) and numeracy_info (a list of
    obj_name, num); other keys are kept. A fault is an `InputError`.
    """
    cleaned = drop_none(record)
    for key in ("nouns", "attr_nouns"):
        if key in cleaned:
            names = _list(cleaned[key], "names", f"{where}: {key}")
            cleaned[key] = [word(one, f"{where}: {key}.{i}") for i, one in enumerate(names)]
    if "spatial_info" in cleaned:
        place, keys = f"{where}: spatial_info", ("obj1", "obj2", "locality")
        _check_keys(cleaned["spatial_info"], keys, place)
        for key in keys:
            word(cleaned["spatial_info"][key], f"{place}.{key}")
    if "numeracy_info" in cleaned:
        place = f"{where}: numeracy_info"
        counts = _list(cleaned["numeracy_info"], "{'obj_name': ..., 'num': ...}", place)
        for i, one in enumerate(counts):
            _check_keys(one, ("obj_name", "num"), f"{place}.{i}")
            one["num"] = count_of(one["num"], f"{place}.{i}.num")
            one["obj_name"] = word(one["obj_name"], f"{place}.{i}.obj_name")
    return cleaned


def _list(value: Any, items: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {value!r} is not a list of {items}")
    return value


def _check_keys(value: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is not a mapping of {', '.join(keys)}")
    for key in value:
        known(key, keys, f"{where}: key")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: {key} is missing; write it")


# T2I-CompBench: the validation prompts with what their text says: nouns, relations, counts.

CATEGORIES = (
    *("color", "shape", "texture", "spatial", "3d_spatial"),
    *("numeracy", "non_spatial", "complex"),
)

LOCALITIES = (
    *("on side of", "next to", "near", "on the left of", "on the right of"),
    *("on the bottom of", "on the top of", "on top of"),
)
"""Relations in the plane; the published evaluator takes the first of them that a prompt has."""

DEPTH_LOCALITIES = ("in front of", "behind", "hidden by")

COUNTS = {"a": 1, "an": 1, **{name: place for place, name in enumerate(NUMBERS[:9]) if place}}

COMPLEX_PARTS = {"spatial": "complex_val_spatial.txt", "action": "complex_val_action.txt"}
"""The files that say by what a complex prompt is judged."""

NOUN_LIST = "new_objects.txt"
"""The singular and plural of the counted nouns."""


class T2ICompBenchPromptsConfig(PromptsConfig):
    """The T2I-CompBench validation prompts."""

    path: str
    """Folder of the published files: CATEGORY_val.txt, new_objects.txt."""
    categories: tuple[str, ...] = CATEGORIES
    """Which categories to take, in this order."""

    @model_validator(mode="after")
    def _known_categories(self) -> Self:
        _some_of("categories", self.categories, CATEGORIES)
        return self

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, category by category; a file with a fault is an `InputError`."""
        return load_t2i_compbench(self.path, self.categories)


def load_t2i_compbench(
    folder: str | Path, categories: Collection[str] = CATEGORIES
) -> tuple[Prompt, ...]:
    """The prompts of the folder, category by category; a fault is an `InputError`.

    Metadata: category and, where the text gives them, nouns, attr_nouns, spatial_info,
    numeracy_info, and for complex prompts complex_part (spatial, action or all). The folder is
    examples/dataset of github.com/Karine-Huang/T2I-CompBench.
    """
    folder = Path(folder)
    singulars = _read_nouns(folder / NOUN_LIST) if "numeracy" in categories else {}
    parts: dict[str, str] = {}
    for part, name in COMPLEX_PARTS.items() if "complex" in categories else ():
        parts |= {_sentence(text): part for _, text in read_lines(folder / name)}
    prompts: list[Prompt] = []
    for category in categories:
        for where, text in read_lines(folder / f"{category}_val.txt"):
            said = _annotations(category, text, where, singulars, parts)
            metadata = {"prompt": text, "category": category, **said}
            prompts.append(Prompt(text, len(prompts), metadata))
    return tuple(prompts)


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
            raise InputError(f"{where}: {line!r} is no pair of nouns; write 'mouse - mice'")
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
    synthetic: Count | None = None
    """So many made-up prompts in place of a file, for trying things out."""
    seed: int = Field(default=0, ge=0)
    """Seed of made-up prompts."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their target; a file with a fault is an `InputError`."""
        if self.path is not None:
            return load_ocr(self.path)
        return synthetic_ocr(self.synthetic or 0, self.seed)


def load_ocr(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file with their target and level; a fault is an `InputError`.

    The file is plain text, JSON lines with `prompt`, or CSV with the columns prompt_raw and
    target_text, as the published length buckets are (github.com/yifan123/flow_grpo, dataset/ocr).
    """
    path = Path(path)
    if path.suffix == ".csv":
        rows = read_table(path, ("prompt_raw", "target_text"))
        records = [(where, {"prompt": _bucketed(row, where)}) for where, row in rows]
    elif path.suffix in JSON_ENDINGS:
        records = [(where, {**r, "prompt": text_of(r, where)}) for where, r in read_records(path)]
    else:
        records = [(where, {"prompt": line}) for where, line in read_lines(path)]
    return _some((_ocr_prompt(record, where, i) for i, (where, record) in enumerate(records)), path)


def synthetic_ocr(num_prompts: int, seed: int) -> tuple[Prompt, ...]:
    """Made-up prompts of one or two common words, for trying things out; marked as synthetic."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(num_prompts):
        words = rng.choice(WORDS, size=int(rng.integers(1, 3)), replace=False)
        text = f'{with_article(str(rng.choice(THINGS)))} that says "{" ".join(words).title()}"'
        record = {"prompt": text[0].upper() + text[1:], "synthetic": True}
        prompts.append(_ocr_prompt(record, "synthetic", index))
    return tuple(prompts)


def level_of(target: str) -> str:
    """Easy, Medium or Hard, by the length of the target without spaces."""
    length = len(target.replace(" ", ""))
    return next((level for level, longest in LEVELS if length <= longest), "Hard")


def _bucketed(row: Record, where: str) -> str:
    text = text_of(row, where, "prompt_raw")
    target, quoted = row.get("target_text"), _target_of(text, where)
    if target != quoted.strip():
        raise InputError(f"{where}: target_text is {target!r}, but the prompt quotes {quoted!r}")
    return text


def _ocr_prompt(record: Record, where: str, index: int) -> Prompt:
    target = _target_of(record["prompt"], where)
    return Prompt(record["prompt"], index, {**record, "target": target, "level": level_of(target)})


def _target_of(text: str, where: str) -> str:
    """What stands between the two double quotes of a prompt."""
    parts = text.split('"')
    if len(parts) != 3:
        raise InputError(f'{where}: {len(parts) - 1} double quotes; write one text in "quotes"')
    if not parts[1].replace(" ", ""):
        raise InputError(f"{where}: the quotes are empty; write the text to be drawn")
    return parts[1]


# Sets without rules of their own.


class DrawBenchPromptsConfig(PromptsConfig):
    """The DrawBench prompts."""

    path: str
    """CSV with the columns Prompts and Category."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their category; a file with a fault is an `InputError`."""
        return load_drawbench(self.path)


def load_drawbench(path: str | Path) -> tuple[Prompt, ...]:
    """The DrawBench prompts: a CSV file with the columns Prompts and Category."""
    prompts: list[Prompt] = []
    for where, row in read_table(Path(path), ("Prompts", "Category")):
        if "Category" not in row:
            raise InputError(f"{where}: empty Category; write one")
        text = text_of(row, where, "Prompts")
        metadata = {"prompt": text, "category": row["Category"]}
        prompts.append(Prompt(text, len(prompts), metadata))
    return _some(prompts, path)


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The files of the HPSv2 benchmark, each a JSON array of 800 prompts."""


class HpsPromptsConfig(PromptsConfig):
    """The prompts of the HPSv2 benchmark."""

    path: str
    """Folder with anime, concept-art, paintings and photo.json, or one such file."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts with their style; a file with a fault is an `InputError`."""
        return load_hps(self.path)


def load_hps(path: str | Path) -> tuple[Prompt, ...]:
    """The HPS prompts: a folder with anime, concept-art, paintings and photo.json, or one file."""
    path = Path(path)
    files = [path / f"{style}.json" for style in HPS_STYLES] if path.is_dir() else [path]
    prompts: list[Prompt] = []
    for file in files:
        for where, value in read_json(file):
            text = text_of(value if isinstance(value, dict) else {"prompt": value}, where)
            prompts.append(Prompt(text, len(prompts), {"prompt": text, "style": file.stem}))
    return tuple(prompts)


class FilePromptsConfig(PromptsConfig):
    """One's own prompts from a file."""

    path: str
    """Plain text with one prompt per line, .jsonl (or .json) records, or .csv."""
    column: str = Field(default="prompt", min_length=1)
    """Key or column of the text; the others become metadata."""

    def build(self) -> tuple[Prompt, ...]:
        """The prompts, numbered in their order; a file with a fault is an `InputError`."""
        return load_file(self.path, column=self.column)


def load_file(path: str | Path, *, column: str = "prompt") -> tuple[Prompt, ...]:
    """One's own prompts: plain text, JSON lines or CSV, with the text under `column`.

    What else a record holds becomes metadata; what the built-in rewards read of it (include, tag,
    exclude, nouns, attr_nouns, spatial_info, numeracy_info) is checked.
    """
    path = Path(path)
    if path.suffix != ".csv" and path.suffix not in JSON_ENDINGS:
        return tuple(Prompt(line, i) for i, (_, line) in enumerate(read_lines(path)))
    prompts: list[Prompt] = []
    for where, given in (
        read_table(path, (column,)) if path.suffix == ".csv" else read_records(path)
    ):
        text, record = text_of(given, where, column), validate_annotations(given, where=where)
        if "include" in record:
            record = validate_metadata(record, where=where)
        prompts.append(Prompt(text, len(prompts), record))
    return _some(prompts, path)


def _some(prompts: Iterable[Prompt], path: str | Path) -> tuple[Prompt, ...]:
    found = tuple(prompts)
    if not found:
        raise InputError(f"{path}: holds no prompts")
    return found


def _some_of(key: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    if not given:
        raise complaint(key, f"is empty; write some of {', '.join(allowed)}")
    for name in given:
        if name not in allowed:
            raise complaint(key, f"unknown '{name}'; {near_or_all(name, allowed)}")
