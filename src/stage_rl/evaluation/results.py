"""Scores by task with their standard errors, and the paired difference of two policies.

Images of one prompt resemble each other, so a standard error counts prompts, not images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

NUM_DRAWS = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class ImageScore:
    """One image's score: 1 or 0 where it is a verdict, or any number."""

    task: str
    prompt: int
    """Index of the prompt in its set."""
    image: int
    """Which of the prompt's images, and so which random stream."""
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    standard_error: float | None
    """None: not known, as with a single prompt."""
    num_images: int
    num_prompts: int
    freedom: float
    """Degrees of freedom of the standard error: prompts - 1, or those that Welch's rule gives."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, mean -+ t standard errors, t the quantile of Student's t."""
        if self.standard_error is None:
            return None
        half = float(student.ppf(0.975, self.freedom)) * self.standard_error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class TaskScores:
    """The estimate of each task, and overall: the unweighted mean over the tasks."""

    tasks: Mapping[str, Estimate]
    overall: Estimate

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the 95 % intervals."""
        rows = {**self.tasks, "overall": self.overall}
        return {name: {**asdict(row), "interval": row.interval} for name, row in rows.items()}


def clustered_mean(values: Sequence[float], prompts: Sequence[int]) -> Estimate:
    """The mean over images and its standard error clustered by prompt.

    With m prompts, n images and d = value - mean: sqrt(m / (m - 1) sum_p (sum_{i in p} d_i)^2) / n,
    which is std(prompt means) / sqrt(m) where every prompt has as many images.
    """
    value_N = np.asarray(values, float)
    assert value_N.size
    _, prompt_N = np.unique(np.asarray(prompts), return_inverse=True)
    sum_P = np.bincount(prompt_N, value_N - value_N.mean())
    m, n = len(sum_P), len(value_N)
    error = math.sqrt(m / (m - 1) * float(np.sum(sum_P**2))) / n if m > 1 else None
    return Estimate(float(value_N.mean()), error, n, m, m - 1)


def task_scores(scores: Iterable[ImageScore], *, pooled: bool = False) -> TaskScores:
    """The scores of one policy by task, tasks in the order they come in.

    `pooled` makes the overall mean that of all images, not of the tasks.
    """
    kept = list(scores)
    tasks = {task: _mean_of(rows) for task, rows in _by_task(kept).items()}
    return TaskScores(tasks, _mean_of(kept) if pooled else _overall(list(tasks.values())))


def bootstrap_intervals(
    scores: Iterable[ImageScore], *, pooled: bool = False
) -> dict[str, tuple[float, float] | None]:
    """The 95 % percentile intervals of the tasks and of `overall`, by drawing prompts again.

    Within each task as many prompts as it has are drawn with replacement, each with all its images.
    None where a task has a single prompt. The same scores give the same intervals.
    """
    rng = np.random.default_rng(0)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    single: set[str] = set()
    for task, rows in _by_task(scores).items():
        _, prompt_N = np.unique([one.prompt for one in rows], return_inverse=True)
        sum_P = np.bincount(prompt_N, [one.value for one in rows])
        count_P = np.bincount(prompt_N)
        if len(sum_P) == 1:
            single.add(task)
        drawn_BP = rng.integers(len(sum_P), size=(NUM_DRAWS, len(sum_P)))
        sums[task], counts[task] = sum_P[drawn_BP].sum(1), count_P[drawn_BP].sum(1)
    means = {task: sums[task] / counts[task] for task in sums}
    overall_B = np.mean(list(means.values()), axis=0)
    if pooled:
        overall_B = np.sum(list(sums.values()), axis=0) / np.sum(list(counts.values()), axis=0)
    intervals = {task: None if task in single else _middle(means[task]) for task in means}
    return {**intervals, "overall": None if single else _middle(overall_B)}


def _middle(mean_B: NDArray[np.float64]) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(mean_B, (0.025, 0.975))
    return float(low), float(high)


def _by_task(scores: Iterable[ImageScore]) -> dict[str, list[ImageScore]]:
    by_task: dict[str, list[ImageScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    return by_task


def _mean_of(rows: Sequence[ImageScore]) -> Estimate:
    return clustered_mean([one.value for one in rows], [one.prompt for one in rows])


def _overall(rows: Sequence[Estimate]) -> Estimate:
    """The mean of the tasks, its freedom by Welch and Satterthwaite.

    With the errors e of the tasks and their freedoms f: (sum e^2)^2 / sum (e^4 / f).
    """
    assert rows
    errors = [row.standard_error for row in rows if row.standard_error is not None]
    error = math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None
    mean = sum(row.mean for row in rows) / len(rows)
    images, prompts = sum(row.num_images for row in rows), sum(row.num_prompts for row in rows)
    spread = sum(row.standard_error**4 / row.freedom for row in rows if row.standard_error)
    # Tasks without any spread have no error to weigh their freedoms by.
    all_freedom = float(sum(row.freedom for row in rows))
    freedom = sum(e**2 for e in errors) ** 2 / spread if spread else all_freedom
    return Estimate(mean, error, images, prompts, freedom)


def paired_difference(
    scores: Iterable[ImageScore], baseline: Iterable[ImageScore]
) -> list[ImageScore]:
    """Score minus baseline, image by image; `task_scores` of it are the paired differences.

    Both must hold the same images (task, prompt, image), as policies do that were evaluated on the
    same prompts and random streams.
    """
    before = {(one.task, one.prompt, one.image): one.value for one in baseline}
    after = {(one.task, one.prompt, one.image): one.value for one in scores}
    assert before.keys() == after.keys(), "the two policies were not judged on the same images"
    return [ImageScore(*key, value - before[key]) for key, value in after.items()]


def render_table(
    columns: Mapping[str, TaskScores],
    *,
    intervals: Mapping[str, Mapping[str, tuple[float, float] | None]] | None = None,
) -> str:
    """Columns side by side, one task per line, as mean +- standard error; of equal tasks.

    A column that has bootstrap intervals is followed by them.
    """
    tasks = next(iter(columns.values())).tasks if columns else {}
    assert all(tuple(scores.tasks) == tuple(tasks) for scores in columns.values())
    given = intervals or {}
    head = ["task"]
    for name in columns:
        head += [name, "95 % bootstrap"] if name in given else [name]
    table = [head]
    for task in [*tasks, "overall"] if columns else []:
        row = [task]
        for name, scores in columns.items():
            row.append(_cell({**scores.tasks, "overall": scores.overall}[task]))
            if name in given:
                row.append(_interval(given[name].get(task)))
        table.append(row)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in table
    ]
    return "\n".join(lines)


def _cell(row: Estimate) -> str:
    error = "" if row.standard_error is None else f" +- {row.standard_error:.3f}"
    return f"{row.mean:.3f}{error}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "not known" if interval is None else "[{:.3f}, {:.3f}]".format(*interval)
