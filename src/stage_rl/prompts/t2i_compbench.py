"""The T2I-CompBench validation prompts with what their text says: nouns, relations, counts.

github.com/Karine-Huang/T2I-CompBench, examples/dataset: CATEGORY_val.txt with 300 prompts each,
new_objects.txt with the singular and plural of the counted nouns, and complex_val_spatial.txt and
complex_val_action.txt, which say by what a complex prompt is judged.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stage_rl.errors import InputError
from stage_rl.prompts.geneval import NUMBERS
from stage_rl.prompts.phrases import noun_phrases
from stage_rl.prompts.reading import read_lines
from stage_rl.types import Prompt

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
