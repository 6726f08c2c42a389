"""Whether training prompts are evaluation prompts too, in the same or in other words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stage_rl.prompts.geneval import INVERSE
from stage_rl.types import Prompt

NAMED = 3
"""Prompts that a sentence names."""


@dataclass(frozen=True)
class Leak:
    """A training prompt that asks for what an evaluation prompt asks for."""

    training: Prompt
    evaluation: Prompt
    same_text: bool
    """False: the same objects in other words, such as in another order."""


def find_leaks(training: Iterable[Prompt], evaluation: Iterable[Prompt]) -> tuple[Leak, ...]:
    """The leaks, one for each evaluation prompt at most, in the order of the evaluation."""
    by_text: dict[str, Prompt] = {}
    by_content: dict[Any, Prompt] = {}
    for prompt in training:
        by_text.setdefault(plain_text(prompt.text), prompt)
        content = content_of(prompt.metadata)
        if content is not None:
            by_content.setdefault(content, prompt)
    leaks = []
    for prompt in evaluation:
        same = by_text.get(plain_text(prompt.text))
        other = by_content.get(content_of(prompt.metadata))
        if same is not None or other is not None:
            leaks.append(Leak(same or other or prompt, prompt, same is not None))
    return tuple(leaks)


def sentence(leaks: Iterable[Leak], num_evaluation: int) -> str:
    """What the leaks are, in one line; empty where there are none."""
    found = list(leaks)
    if not found:
        return ""
    same = sum(leak.same_text for leak in found)
    examples = ", ".join(f"'{leak.evaluation.text}'" for leak in found[:NAMED])
    more = ", ..." if len(found) > NAMED else ""
    return (
        f"{len(found)} of {num_evaluation} evaluation prompts are in the training set "
        f"({same} word for word, {len(found) - same} in other words): {examples}{more}"
    )


def plain_text(text: str) -> str:
    """A text as it is compared: small letters, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(". ")


def content_of(metadata: Mapping[str, Any]) -> Any:
    """What a GenEval record asks for, whatever its order of words; None without clauses.

    "A left of B" and "B right of A" ask for the same. What else the record holds, such as the
    background of a prompt of the shapes world, counts as well.
    """
    if not metadata.get("include"):
        return None
    clauses = metadata["include"]
    objects = sorted((one["class"], one["count"], one.get("color", "")) for one in clauses)
    relations = sorted(
        _relation(one, clauses[one["position"][1]]) for one in clauses if "position" in one
    )
    others = sorted(
        (key, str(value))
        for key, value in metadata.items()
        if key not in ("tag", "include", "exclude", "prompt")
    )
    return tuple(objects), tuple(relations), tuple(others)


def _relation(clause: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, str, str]:
    relation = clause["position"][0]
    a, b = clause["class"], target["class"]
    return min((a, relation, b), (b, INVERSE[relation], a))
