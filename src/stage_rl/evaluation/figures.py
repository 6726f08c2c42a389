"""How sure the figures that papers print are: the aggregation anew over prompts drawn again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stage_rl.evaluation.aggregation import PromptAnswers
from stage_rl.evaluation.results import Draws

NUM_DRAWS = 400
"""Fewer than of measures: each is an aggregation of its own."""


def figure_draws(
    rows: Sequence[PromptAnswers],
    tasks: Sequence[str],
    aggregate: Callable[[Sequence[PromptAnswers]], Mapping[str, float]],
) -> Draws:
    """The figures of as many prompts of each task, drawn with replacement, with all their images.

    `tasks` are those of the rows. Equal tasks give equal draws, so those of two models are pairs.
    Nothing where a task has a single prompt.
    """
    places: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        places.setdefault(task, []).append(place)
    if any(len(some) == 1 for some in places.values()):
        return {}
    rng = np.random.default_rng(0)
    found: dict[str, list[float | None]] = {name: [] for name in aggregate(rows)}
    for _ in range(NUM_DRAWS):
        drawn = [rows[place] for some in places.values() for place in rng.choice(some, len(some))]
        figures = aggregate(drawn)
        for name, values in found.items():
            values.append(figures.get(name))
    return {name: tuple(values) for name, values in found.items()}
