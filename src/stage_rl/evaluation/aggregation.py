"""From the answers of a judge to the figures that papers print: pure, so that no judge is asked
again where an aggregation changes.

Every value is how right an answer is, in [0, 1]; None where the judge gave none that can be read,
which is left out and never counted as wrong.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stage_rl.prompts.questions import Question, questions_of
from stage_rl.rewards.base import Score
from stage_rl.rewards.ocr import edit_distance
from stage_rl.rewards.vlm.judge import matched_words
from stage_rl.types import Prompt


@dataclass(frozen=True)
class ImageAnswers:
    """What a judge said of one image."""

    values: tuple[float | None, ...] = ()
    """In the order of the prompt's questions; None: no answer that can be read."""
    replies: tuple[str, ...] = ()
    """Word for word; of a transcription the text that was read."""


@dataclass(frozen=True)
class PromptAnswers:
    """What a judge said of all images of a prompt."""

    images: tuple[ImageAnswers, ...]
    questions: tuple[Question, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def image_answers(prompt: Prompt, score: Score) -> ImageAnswers:
    """A judge's answers in the order of the prompt's questions."""
    number = len(prompt.metadata.get("questions", ()))
    return ImageAnswers(tuple(score.extras.get(f"q{i}") for i in range(number)), score.replies)


def prompt_answers(prompt: Prompt, scores: Sequence[Score]) -> PromptAnswers:
    """The answers about all images of a prompt."""
    return PromptAnswers(
        tuple(image_answers(prompt, score) for score in scores),
        questions_of(prompt),
        prompt.metadata.get("groups", {}),
        prompt.metadata.get("fields", {}),
    )


def share_missing(rows: Iterable[PromptAnswers]) -> float:
    """The share of the answers that could not be read; 0 without any question."""
    values = [value for row in rows for image in row.images for value in image.values]
    return values.count(None) / len(values) if values else 0.0


def soft_tifa(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """GenEval 2 (arXiv 2512.16853), in percent.

    GM: the geometric mean of an image's atoms, in the mean over prompts, and by number of atoms;
    AM: the arithmetic; the skills pool their atoms.
    """
    gm = _by_prompt(rows, lambda row, values: geometric_mean(values))
    am = _by_prompt(rows, lambda row, values: _mean(values))
    by_atoms: dict[str, list[float]] = {}
    for row, value in zip(rows, gm, strict=True):
        if value is not None:
            by_atoms.setdefault(row.groups.get("atoms", ""), []).append(value)
    atoms = {f"GM, {name} atoms": by_atoms[name] for name in sorted(by_atoms, key=_natural)}
    figures = {"GM": _present(gm), "AM": _present(am), **_pooled(rows, _group), **atoms}
    return _means(figures, scale=100)


def dependency_graph(rows: Sequence[PromptAnswers], *, scale: float = 1.0) -> dict[str, float]:
    """DPG-Bench (arXiv 2403.05135), times `scale`: the mean of the prompts, and by category the
    pooled answers as given, whatever they depend on.
    """
    overall = _by_prompt(rows, lambda row, v: dependent_mean(row.questions, v, parents="zeroed"))
    categories = _pooled(rows, lambda row, question: question.group.split("-")[0].strip())
    return _means({"overall": _present(overall), **categories}, scale=scale)


def alignment(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """The alignment of OneIG-Bench (arXiv 2506.07977): the mean of all prompts and of each
    category's.
    """
    overall = _by_prompt(rows, lambda row, v: dependent_mean(row.questions, v, parents="raw"))
    by_category: dict[str, list[float]] = {}
    for row, value in zip(rows, overall, strict=True):
        if value is not None:
            by_category.setdefault(row.groups["category"], []).append(value)
    return _means({"overall": _present(overall), **by_category})


def dependent_mean(
    questions: Sequence[Question],
    values: Sequence[float],
    *,
    parents: Literal["raw", "zeroed"],
) -> float:
    """The mean of an image's answers, in which a child of a wrong answer is 0.

    `zeroed`: parents that were set to 0 count as wrong, in the order of the file; `raw`: only those
    that were answered wrong.
    """
    given = {one.id: value for one, value in zip(questions, values, strict=True)}
    kept = dict(given)
    for one in questions:
        of_parents = kept if parents == "zeroed" else given
        if any(of_parents[parent] == 0 for parent in one.parents):
            kept[one.id] = 0.0
    return _mean(list(kept.values()))


WISE_WEIGHTS = {
    "Culture": 0.4,
    **dict.fromkeys(("Time", "Space", "Biology", "Physics", "Chemistry"), 0.12),
}


def wise_weights(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """WISE, verified release: each category, and their weighted sum where all are there."""
    categories = _means(_pooled(rows, lambda row, question: row.groups["category"]))
    if not WISE_WEIGHTS.keys() <= categories.keys():
        return categories
    overall = sum(weight * categories[name] for name, weight in WISE_WEIGHTS.items())
    return {"overall": overall, **categories}


REASONING = ("numeracy", "negation", "differentiation", "comparison")

TIIF_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Attribute": ("shape+color", "color+texture", "texture+color", "shape+texture"),
    "Relation": ("2d_spatial_relation", "3d_spatial_relation", "action+2d", "action+3d"),
    "Reasoning": REASONING,
    "Attribute+Relation": (
        *("action+color", "action+texture"),
        *(f"{name}+{space}" for name in ("color", "shape", "texture") for space in ("2d", "3d")),
    ),
    "Attribute+Reasoning": tuple(f"{r}+{a}" for r in REASONING for a in ("color", "texture")),
    "Relation+Reasoning": tuple(f"{r}+{space}" for r in REASONING for space in ("2d", "3d")),
    "Text": ("text",),
    "Style": ("style",),
    "Real world": ("real_world",),
}


def nine_groups(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """TIIF-Bench (arXiv 2506.02161), in percent, for short and for long prompts.

    A group is the mean of its attributes, each of which pools its answers; overall is the mean of
    the nine groups, where all are there.
    """
    figures = {}
    for length in ("short", "long"):
        some = [row for row in rows if row.groups["length"] == length]
        attributes = _means(_pooled(some, lambda row, question: row.groups["attribute"]))
        groups = {
            name: _mean(present)
            for name, members in TIIF_GROUPS.items()
            if (present := [attributes[one] for one in members if one in attributes])
        }
        if len(groups) == len(TIIF_GROUPS):
            figures[length] = 100 * _mean(list(groups.values()))
        figures |= {f"{length}: {name}": 100 * value for name, value in groups.items()}
    return figures


NUM_DIMENSIONS = 10


def ten_dimensions(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """UniGenBench++ (arXiv 2510.18701), in percent: each primary dimension pools its test points,
    overall is their mean, where all ten are there.
    """
    pooled = _pooled(rows, lambda row, question: question.group.split("-")[0].strip())
    dimensions = _means(pooled, scale=100)
    if len(dimensions) < NUM_DIMENSIONS:
        return dimensions
    return {"overall": _mean(list(dimensions.values())), **dimensions}


# Written text.

LETTERS = r"[^\u4e00-\u9fa5a-zA-Z0-9\sàâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ]"
"""Everything else is dropped before texts are compared."""

NOT_TEXT = ("addCriterion", "No text recognized.")
"""What Qwen2.5-VL writes where there is nothing to read."""

MAX_EDITS = 100


def word_overlap(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """LongText-Bench (arXiv 2507.22058): the share of all words that were read, capitals aside."""
    matched = total = 0
    for target, read in _texts(rows):
        found, words = matched_words(target.lower(), read.lower())
        matched, total = matched + found, total + words
    return {"words read": matched / total} if total else {}


def text_rendering(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """The text score of OneIG-Bench (arXiv 2506.07977), capitals and all.

    1 - min(100, ED) (1 - CR) (1 - WAC) / 100 of the mean edit distance, the share of texts without
    any, and the share of words read.
    """
    edits, matched, total = [], 0, 0
    for target, read in _texts(rows, _words_or_characters):
        edits.append(_edits(read, target))
        found, words = matched_words(target, read)
        matched, total = matched + found, total + words
    if not edits or not total:
        return {}
    distance, exact, share = _mean(edits), edits.count(0) / len(edits), matched / total
    score = 1 - min(MAX_EDITS, distance) * (1 - exact) * (1 - share) / MAX_EDITS
    return {"text": score, "ED": distance, "CR": exact, "WAC": share}


def region_words(rows: Sequence[PromptAnswers]) -> dict[str, float]:
    """CVTG-2K (arXiv 2503.23461): the share of words found among those read, and the mean of
    1 - edit distance / longer word, each against the closest word that was read.
    """
    found, closeness = [], []
    for row in rows:
        for image in row.images:
            read = " ".join(image.replies).lower()
            words = read.split()
            for word in row.fields["text"].split():
                found.append(float(word in words))
                closeness.append(_closeness(word, read))
    return _means({"word accuracy": found, "NED": closeness})


@functools.lru_cache(maxsize=1 << 16)
def plain_text(text: str) -> str:
    """Letters and digits with one space between words."""
    return re.sub(r"\s+", " ", re.sub(LETTERS, "", text)).strip()


def _words_or_characters(text: str) -> str:
    """As `plain_text`; one with a Chinese character has no spaces (OneIG-Bench)."""
    plain = plain_text(text)
    return plain.replace(" ", "") if re.search(r"[\u4e00-\u9fa5]", plain) else plain


def _texts(
    rows: Sequence[PromptAnswers], plain: Callable[[str], str] = plain_text
) -> Iterable[tuple[str, str]]:
    """Target and what was read of every image, both made plain."""
    for row in rows:
        for image in row.images:
            read = " ".join(image.replies)
            for words in NOT_TEXT:
                read = read.replace(words, "")
            yield plain(row.fields["text"]), plain(read)


# The bootstrap compares the same texts again and again.
_edits = functools.lru_cache(maxsize=1 << 16)(edit_distance)


@functools.lru_cache(maxsize=1 << 16)
def _closeness(word: str, read: str) -> float:
    near = difflib.get_close_matches(word, read.split() or [""], n=1, cutoff=0)
    if not near:
        return 0.0
    return 1 - edit_distance(word, near[0]) / (max(len(word), len(near[0])) + 1e-5)


# What they share.


def whole_values(image: ImageAnswers) -> list[float] | None:
    """An image's answers; None where one is missing, or nothing was asked."""
    values = _present(image.values)
    return values if values and len(values) == len(image.values) else None


def geometric_mean(values: Sequence[float]) -> float:
    """0 where one of them is."""
    if min(values) <= 0:
        return 0.0
    return math.exp(_mean([math.log(value) for value in values]))


def _group(row: PromptAnswers, question: Question) -> str:
    return question.group


def _by_prompt(
    rows: Sequence[PromptAnswers], of_image: Callable[[PromptAnswers, Sequence[float]], float]
) -> list[float | None]:
    """The mean over each prompt's images with all answers; None for a prompt without one."""
    means: list[float | None] = []
    for row in rows:
        answered = [values for image in row.images if (values := whole_values(image))]
        images = [of_image(row, values) for values in answered]
        means.append(_mean(images) if images else None)
    return means


def _pooled(
    rows: Sequence[PromptAnswers], name_of: Callable[[PromptAnswers, Question], str]
) -> dict[str, list[float]]:
    """All answers by a name of row and question, in the order they come in."""
    pooled: dict[str, list[float]] = {}
    for row in rows:
        for image in row.images:
            for question, value in zip(row.questions, image.values, strict=True):
                if value is not None:
                    pooled.setdefault(name_of(row, question), []).append(value)
    return pooled


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _means(lists: Mapping[str, Sequence[float]], *, scale: float = 1.0) -> dict[str, float]:
    return {name: scale * _mean(values) for name, values in lists.items() if values}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _natural(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdigit() else (0, text)
