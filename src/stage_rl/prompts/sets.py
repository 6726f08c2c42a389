"""Prompt files without rules of their own: DrawBench, the HPS benchmark, and one's own."""

from __future__ import annotations

import itertools
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from stage_rl.errors import InputError
from stage_rl.prompts.files import (
    JSON_LINES,
    PromptsConfig,
    as_prompts,
    drop_none,
    known,
    load_prompts,
    read_json,
    read_lines,
    read_records,
    read_table,
    text_of,
    validate_metadata,
    whole,
    word,
)
from stage_rl.prompts.geneval import (
    GENEVAL,
    MIXES,
    NUMBERS,
    Record,
    Vocabulary,
    evaluation_texts,
    training_mix,
    with_article,
)
from stage_rl.settings import Count, NonNegative, Settings, complaint, near_or_all
from stage_rl.types import Prompt

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The files of the HPSv2 benchmark, each a JSON array of 800 prompts."""


def load_drawbench(path: str | Path) -> tuple[Prompt, ...]:
    """The DrawBench prompts: a CSV file with the columns Prompts and Category."""
    path = Path(path)
    prompts: list[Prompt] = []
    for where, row in read_table(path, ("Prompts", "Category")):
        if "Category" not in row:
            raise InputError(f"{where}: empty Category; write one")
        text = text_of(row, where, "Prompts")
        metadata = {"prompt": text, "category": row["Category"]}
        prompts.append(Prompt(text, len(prompts), metadata))
    return _some(prompts, path)


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


def load_file(path: str | Path, *, column: str = "prompt") -> tuple[Prompt, ...]:
    """One's own prompts: plain text, JSON lines or CSV, with the text under `column`.

    What else a record holds becomes metadata; what the built-in rewards read of it (include, tag,
    exclude, nouns, attr_nouns, spatial_info, numeracy_info) is checked.
    """
    path = Path(path)
    if path.suffix == ".csv":
        records = read_table(path, (column,))
    elif path.suffix in JSON_LINES:
        records = read_records(path)
    else:
        return tuple(Prompt(line, i) for i, (_, line) in enumerate(read_lines(path)))
    prompts = [
        Prompt(text_of(record, where, column), i, checked(record, where))
        for i, (where, record) in enumerate(records)
    ]
    return _some(prompts, path)


def checked(record: Record, where: str) -> Record:
    """A record's known fields ready to judge by, whatever form it has; else an `InputError`."""
    annotated = validate_annotations(drop_none(record), where=where)
    return validate_metadata(annotated, where=where) if "include" in annotated else annotated


def _some(prompts: list[Prompt], path: Path) -> tuple[Prompt, ...]:
    if not prompts:
        raise InputError(f"{path}: holds no prompts")
    return tuple(prompts)


# Noun phrases of a prompt by closed word lists, where no parser is at hand.
#
# T2I-CompBench takes its phrases from a statistical parser whose model no package index has.
# These
# rules agree with what such a parser finds on prompts of the kind "a green bench and a blue
# bowl";
# in longer sentences they can differ, and the benchmark says so.


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
    phrases: list[str] = []
    for clause in re.split(r"[.,;:!?]+", text.lower()):
        phrases += _of_clause(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", clause))
    seen = [phrase for phrase in phrases if phrase not in LEFT_OUT]
    return seen[:MAX_PHRASES]


def _of_clause(words: list[str]) -> list[str]:
    phrases: list[str] = []
    current: list[str] = []
    for spoken, after in zip(words, [*words[1:], ""], strict=False):
        ends = _is_outside(spoken, after, open_phrase=bool(current))
        if (ends or spoken in DETERMINERS) and current:
            phrases.append(" ".join(current))
            current = []
        if not ends:
            current.append(spoken)
    phrases += [" ".join(current)] if current else []
    # A determiner alone, as in "this is", names nothing.
    return [phrase for phrase in phrases if phrase not in DETERMINERS]


def _is_outside(word: str, after: str, *, open_phrase: bool) -> bool:
    """Whether a word ends a phrase: a closed-class word, an adverb, or a verb."""
    if word in BREAKS:
        return True
    thing_follows = after and after not in BREAKS and after not in DETERMINERS
    if word in VERBS:
        # "a blue rose and ..." and "a trophy stand" are things.
        return open_phrase and after not in ("", "and", "or", "but")
    ending = len(word) > 4 and word.endswith(("ed", "ly", "ing"))
    return ending and word not in PHRASE_NOUNS and not thing_follows


# Prompts that ask for written text: the text in quotes is the target of the OCR reward.
#
# github.com/yifan123/flow_grpo, dataset/ocr: one prompt per line, exactly one text in double
# quotes.


LEVELS = (("Easy", 5), ("Medium", 10))
"""Longest target of a level, in characters without spaces; longer ones are Hard."""

BUCKET_COLUMNS = ("prompt_raw", "target_text")

THINGS = ("sign", "poster", "book cover", "mug", "neon sign", "shop window", "banner", "T-shirt")

WORDS = (
    *("open", "sale", "coffee", "welcome", "exit", "music", "garden", "north", "hello", "summer"),
    *("bakery", "library", "pizza", "museum", "station", "forever", "stage", "market", "ocean"),
)


def load_ocr(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file with their target and level; a fault is an `InputError`.

    The file is plain text, JSON lines with `prompt`, or CSV with the columns prompt_raw and
    target_text, as the published length buckets are.
    """
    path = Path(path)
    if path.suffix == ".csv":
        rows = read_table(path, BUCKET_COLUMNS)
        records = [(where, _bucketed(row, where)) for where, row in rows]
    elif path.suffix in JSON_LINES:
        records = [(where, {**r, "prompt": text_of(r, where)}) for where, r in read_records(path)]
    else:
        records = [(where, {"prompt": line}) for where, line in read_lines(path)]
    if not records:
        raise InputError(f"{path}: holds no prompts")
    return tuple(_prompt(record, where, i) for i, (where, record) in enumerate(records))


def synthetic_ocr(num_prompts: int, seed: int) -> tuple[Prompt, ...]:
    """Made-up prompts of one or two common words, for trying things out; marked as synthetic."""
    rng = np.random.default_rng(seed)
    prompts = []
    for index in range(num_prompts):
        words = rng.choice(WORDS, size=int(rng.integers(1, 3)), replace=False)
        text = f'{with_article(str(rng.choice(THINGS)))} that says "{" ".join(words).title()}"'
        record = {"prompt": text[0].upper() + text[1:], "synthetic": True}
        prompts.append(_prompt(record, "synthetic", index))
    return tuple(prompts)


def target_of(text: str, where: str) -> str:
    """What stands between the two double quotes of a prompt; else an `InputError`."""
    parts = text.split('"')
    if len(parts) != 3:
        raise InputError(f'{where}: {len(parts) - 1} double quotes; write one text in "quotes"')
    if not parts[1].replace(" ", ""):
        raise InputError(f"{where}: the quotes are empty; write the text to be drawn")
    return parts[1]


def level_of(target: str) -> str:
    """Easy, Medium or Hard, by the length of the target without spaces."""
    length = len(target.replace(" ", ""))
    return next((level for level, longest in LEVELS if length <= longest), "Hard")


def _bucketed(row: Record, where: str) -> Record:
    text = text_of(row, where, "prompt_raw")
    target, quoted = row.get("target_text"), target_of(text, where)
    if target != quoted.strip():
        raise InputError(f"{where}: target_text is {target!r}, but the prompt quotes {quoted!r}")
    return {"prompt": text}


def _prompt(record: Record, where: str, index: int) -> Prompt:
    target = target_of(record["prompt"], where)
    return Prompt(record["prompt"], index, {**record, "target": target, "level": level_of(target)})


# The T2I-CompBench validation prompts with what their text says: nouns, relations, counts.
#
# github.com/Karine-Huang/T2I-CompBench, examples/dataset: CATEGORY_val.txt with 300 prompts each,
# new_objects.txt with the singular and plural of the counted nouns, and complex_val_spatial.txt
# and
# complex_val_action.txt, which say by what a complex prompt is judged.


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

NOUN_LIST = "new_objects.txt"


def load_t2i_compbench(
    folder: str | Path, categories: Collection[str] = CATEGORIES
) -> tuple[Prompt, ...]:
    """The prompts of the folder, category by category; a fault is an `InputError`.

    Metadata: category and, where the text gives them, nouns, attr_nouns, spatial_info,
    numeracy_info, and for complex prompts complex_part (spatial, action or all).
    """
    folder = Path(folder)
    prompts: list[Prompt] = []
    for category in categories:
        file = folder / f"{category}_val.txt"
        annotate = _annotator(category, folder)
        for where, text in read_lines(file):
            metadata = {"prompt": text, "category": category, **annotate(text, where)}
            prompts.append(Prompt(text, len(prompts), metadata))
    return tuple(prompts)


def read_noun_list(path: str | Path) -> dict[str, str]:
    """Singular by each of its forms, from lines `singular - plural`."""
    forms: dict[str, str] = {}
    for where, line in read_lines(Path(path)):
        singular, dash, plural = (part.strip() for part in line.partition(" - "))
        if not (singular and dash and plural):
            raise InputError(f"{where}: {line!r} is no pair of nouns; write 'mouse - mice'")
        forms.update({singular: singular, plural: singular})
    return forms


def relation_of(text: str, localities: Collection[str]) -> dict[str, str] | None:
    """The two things of a relation and its words; None where the text has none of them."""
    for locality in localities:
        before, found, after = plain(text).partition(f" {locality} ")
        if found:
            things = [_last(noun_phrases(before), -1), _last(noun_phrases(after), 0)]
            if all(things):
                return {"obj1": things[0], "obj2": things[1], "locality": locality}
    return None


def counts_of(text: str, forms: Mapping[str, str]) -> list[dict[str, Any]]:
    """The counted nouns of a text: each number word that stands before a known noun."""
    words = re.findall(r"[a-z]+", text.lower())
    pairs = itertools.pairwise(words)
    return [
        {"obj_name": forms[b], "num": COUNTS[a]} for a, b in pairs if a in COUNTS and b in forms
    ]


def plain(text: str) -> str:
    """A prompt in small letters up to its first full stop, as the published lists compare them."""
    return text.lower().partition(".")[0].strip()


def _annotator(category: str, folder: Path) -> Any:
    """From a prompt and its place to the metadata of the category."""
    if category in ("spatial", "3d_spatial"):
        known = LOCALITIES if category == "spatial" else DEPTH_LOCALITIES
        return lambda text, where: _spatial(text, where, known)
    if category == "numeracy":
        forms = read_noun_list(folder / NOUN_LIST)
        return lambda text, where: _numeracy(text, where, forms)
    if category == "non_spatial":
        return lambda text, where: {}
    parts = {}
    if category == "complex":
        files = {part: read_lines(folder / name) for part, name in COMPLEX_PARTS.items()}
        parts = {plain(text): part for part, lines in files.items() for _, text in lines}
    return lambda text, where: _attributes(text, where, parts if category == "complex" else None)


def _spatial(text: str, where: str, localities: Collection[str]) -> dict[str, Any]:
    relation = relation_of(text, localities)
    if relation is None:
        words = ", ".join(localities)
        raise InputError(f"{where}: no relation in {text!r}; write THING RELATION THING ({words})")
    return {"nouns": [relation["obj1"], relation["obj2"]], "spatial_info": relation}


def _numeracy(text: str, where: str, forms: Mapping[str, str]) -> dict[str, Any]:
    counts = counts_of(text, forms)
    if not counts:
        raise InputError(f"{where}: no counted noun of {NOUN_LIST} in {text!r}; add the noun there")
    return {"nouns": [one["obj_name"] for one in counts], "numeracy_info": counts}


def _attributes(text: str, where: str, parts: Mapping[str, str] | None) -> dict[str, Any]:
    phrases = noun_phrases(text)
    if not phrases:
        raise InputError(f"{where}: no noun phrase in {text!r}; write what is to be seen")
    metadata: dict[str, Any] = {"attr_nouns": phrases}
    if parts is not None:
        metadata["complex_part"] = parts.get(plain(text), "all")
        relation = relation_of(text, LOCALITIES)
        if relation is not None:
            metadata["spatial_info"] = relation
            metadata["nouns"] = [relation["obj1"], relation["obj2"]]
    return metadata


def _last(phrases: list[str], place: int) -> str:
    """The head, the last word, of the first or last phrase; empty where there is none."""
    return phrases[place].split()[-1] if phrases else ""


# The T2I-R1 training set: prompts with their nouns, attributes, relations and counts.
#
# github.com/CaraJ7/T2I-R1, data/geneval_and_t2i_data_final.json (JSON lines in spite of its
# name).


TASK_TYPES = (
    *("color", "shape", "texture", "spatial", "numeracy"),
    *("object", "non", "complex"),
)

NEEDED = {"spatial": "spatial_info", "numeracy": "numeracy_info"}
"""What a task type cannot be judged without."""


def load_t2i_r1(path: str | Path, task_types: Collection[str] = TASK_TYPES) -> tuple[Prompt, ...]:
    """The prompts of some task types, numbered by their line; a fault is an `InputError`."""
    path = Path(path)
    prompts: list[Prompt] = []
    for number, (where, parsed) in enumerate(read_records(path)):
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
            values = cleaned[key]
            if not isinstance(values, list) or not values:
                raise InputError(f"{where}: {key}: {values!r} is not a list of names")
            cleaned[key] = [word(one, f"{where}: {key}.{i}") for i, one in enumerate(values)]
    if "spatial_info" in cleaned:
        keys = ("obj1", "obj2", "locality")
        cleaned["spatial_info"] = _mapping(cleaned["spatial_info"], keys, f"{where}: spatial_info")
        for key in keys:
            word(cleaned["spatial_info"][key], f"{where}: spatial_info.{key}")
    if "numeracy_info" in cleaned:
        cleaned["numeracy_info"] = _counts(cleaned["numeracy_info"], f"{where}: numeracy_info")
    return cleaned


def _counts(items: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(items, list) or not items:
        raise InputError(f"{where}: {items!r} is not a list of {{'obj_name': ..., 'num': ...}}")
    counts: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        given = _mapping(item, ("obj_name", "num"), f"{where}.{i}")
        num = whole(given["num"], f"{where}.{i}.num")
        if num < 1:
            raise InputError(f"{where}.{i}.num: {num}; write 1 or more")
        counts.append({**given, "obj_name": word(given["obj_name"], f"{where}.{i}.obj_name")})
        counts[-1]["num"] = num
    return counts


def _mapping(value: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """A mapping of exactly these keys."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {value!r} is not a mapping of {', '.join(keys)}")
    for key in value:
        known(key, keys, f"{where}: key")
    for key in keys:
        if key not in value:
            raise InputError(f"{where}: {key} is missing; write it")
    return dict(value)


# What a recipe says of the built-in prompt sets.


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
