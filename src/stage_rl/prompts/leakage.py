"""Whether training prompts are evaluation prompts too, in the same or in other words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from stage_rl.prompts.geneval import content_of
from stage_rl.types import Prompt


class Leak(NamedTuple):
    """An evaluation prompt that a training prompt asks for too."""

    evaluation: Prompt
    same_text: bool
    """False: the same objects in other words, such as in another order."""


def find_leaks(training: Iterable[Prompt], evaluation: Iterable[Prompt]) -> list[Leak]:
    """The leaks, one for each evaluation prompt at most, in the order of the evaluation."""
    training = list(training)
    texts = {plain_text(prompt.text) for prompt in training}
    contents = {content_of(prompt.metadata) for prompt in training} - {None}
    return [
        Leak(prompt, plain_text(prompt.text) in texts)
        for prompt in evaluation
        if plain_text(prompt.text) in texts or content_of(prompt.metadata) in contents
    ]


def sentence(leaks: list[Leak], num_evaluation: int) -> str:
    """What the leaks are, in one line; empty where there are none."""
    if not leaks:
        return ""
    same = sum(leak.same_text for leak in leaks)
    examples = ", ".join(f"'{leak.evaluation.text}'" for leak in leaks[:3])
    more = ", ..." if len(leaks) > 3 else ""
    return (
        f"{len(leaks)} of {num_evaluation} evaluation prompts are in the training set "
        f"({same} word for word, {len(leaks) - same} in other words): {examples}{more}"
    )


def plain_text(text: str) -> str:
    """A text as it is compared: small letters, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(". ")
