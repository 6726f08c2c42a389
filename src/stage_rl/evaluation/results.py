"""Scores by task with their standard errors, and the paired difference of two policies.

Images of one prompt resemble each other, so a standard error counts prompts, not images.
"""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor
from torch.nn.functional import normalize

from stage_rl.console import aligned
from stage_rl.errors import InputError

NUM_DRAWS = 2000
"""Of the bootstrap."""

OVERALL = "overall"
"""The row of all tasks."""

Interval = tuple[float, float] | None
"""Lowest and highest value; None: not known."""


Draws = Mapping[str, tuple[float | None, ...]]
"""Every figure, draw by draw of the bootstrap; None where a draw has no such figure."""


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
    bounds: Interval = None
    """Between which any mean lies, as that of verdicts does."""

    @property
    def interval(self) -> Interval:
        """The 95 % interval, mean -+ t standard errors, t the quantile of Student's t, as far as
        the bounds go.
        """
        if self.standard_error is None:
            return None
        half = float(student.ppf(0.975, self.freedom)) * self.standard_error
        low, high = self.bounds or (-math.inf, math.inf)
        return max(low, self.mean - half), min(high, self.mean + half)


TaskScores = Mapping[str, Estimate]
"""The estimate of each task, then that of all of them under `overall`."""


def task_scores(
    scores: Iterable[ImageScore], *, pooled: bool = False, bounds: Interval = None
) -> TaskScores:
    """The scores of one policy by task, tasks in the order they come in, and overall.

    That is the unweighted mean over the tasks or, `pooled`, over all images. Nothing for no scores.
    `bounds` are those of each value.
    """
    kept = list(scores)
    if not kept:
        return {}
    tasks = {task: _clustered_mean(rows) for task, rows in _by_task(kept).items()}
    overall = _clustered_mean(kept) if pooled else _mean_of_tasks(list(tasks.values()))
    rows = {**tasks, OVERALL: overall}
    return {name: replace(row, bounds=bounds) for name, row in rows.items()}


def plain_scores(rows: TaskScores) -> dict[str, Any]:
    """As plain values, with the 95 % intervals."""
    return {name: {**asdict(row), "interval": row.interval} for name, row in rows.items()}


def bootstrap_intervals(
    scores: Iterable[ImageScore], *, pooled: bool = False
) -> dict[str, Interval]:
    """The 95 % percentile intervals of the tasks and of `overall`, by drawing prompts again.

    Within each task as many prompts as it has are drawn with replacement, each with all its images.
    None where a task has a single prompt. The same scores give the same intervals.
    """
    rng = np.random.default_rng(0)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.float64]] = {}
    single = set()
    for task, rows in _by_task(scores).items():
        prompt_N = _prompts(rows)
        sum_P = np.bincount(prompt_N, [one.value for one in rows])
        count_P = np.bincount(prompt_N)
        if len(sum_P) == 1:
            single |= {task, OVERALL}
        drawn_BP = rng.integers(len(sum_P), size=(NUM_DRAWS, len(sum_P)))
        sums[task], counts[task] = sum_P[drawn_BP].sum(1), count_P[drawn_BP].sum(1)
    means = {task: sums[task] / counts[task] for task in sums}
    overall_B = np.mean(list(means.values()), axis=0)
    if pooled:
        overall_B = np.sum(list(sums.values()), axis=0) / np.sum(list(counts.values()), axis=0)
    return {
        row: None if row in single else _middle(mean_B)
        for row, mean_B in {**means, OVERALL: overall_B}.items()
    }


def interval_of(draws: Sequence[float | None]) -> Interval:
    """The 95 % percentile interval; None without draws, or where one of them has no figure."""
    known = [value for value in draws if value is not None]
    if not known or len(known) < len(draws):
        return None
    return _middle(np.asarray(known))


def paired_interval(before: Sequence[float | None], after: Sequence[float | None]) -> Interval:
    """That of the difference of two models by equal draws."""
    if len(before) != len(after):
        return None
    return interval_of(
        [
            None if old is None or new is None else new - old
            for old, new in zip(before, after, strict=True)
        ]
    )


def _middle(mean_B: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(mean_B, (0.025, 0.975))
    return float(low), float(high)


def _are_verdicts(scores: Iterable[ImageScore]) -> bool:
    return {one.value for one in scores} <= {0.0, 1.0}


def _by_task(scores: Iterable[ImageScore]) -> dict[str, list[ImageScore]]:
    by_task: dict[str, list[ImageScore]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score)
    return by_task


def _prompts(scores: Sequence[ImageScore]) -> NDArray[np.intp]:
    """The prompt of each score, numbered from 0 on."""
    return np.unique([one.prompt for one in scores], return_inverse=True)[1]


def _clustered_mean(scores: Sequence[ImageScore]) -> Estimate:
    """The mean over images and its standard error clustered by prompt.

    With m prompts, n images and d = value - mean: sqrt(m / (m - 1) sum_p (sum_{i in p} d_i)^2) / n,
    which is std(prompt means) / sqrt(m) where every prompt has as many images.
    """
    value_N = np.asarray([one.value for one in scores], float)
    sum_P = np.bincount(_prompts(scores), value_N - value_N.mean())
    m, n = len(sum_P), len(value_N)
    error = math.sqrt(m / (m - 1) * float(np.sum(sum_P**2))) / n if m > 1 else None
    return Estimate(float(value_N.mean()), error, n, m, m - 1)


def _mean_of_tasks(rows: Sequence[Estimate]) -> Estimate:
    """The mean of the tasks, its freedom by Welch and Satterthwaite.

    With the errors e of the tasks and their freedoms f: (sum e^2)^2 / sum (e^4 / f).
    """
    errors = [row.standard_error for row in rows if row.standard_error is not None]
    error = math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None
    mean = sum(row.mean for row in rows) / len(rows)
    images, prompts = sum(row.num_images for row in rows), sum(row.num_prompts for row in rows)
    spread = sum(row.standard_error**4 / row.freedom for row in rows if row.standard_error)
    # Tasks without any spread have no error to weigh their freedoms by.
    all_freedom = float(sum(row.freedom for row in rows))
    freedom = sum(e**2 for e in errors) ** 2 / spread if spread else all_freedom
    return Estimate(mean, error, images, prompts, freedom)


def render_table(columns: Mapping[str, Mapping[str, Estimate | Interval]]) -> str:
    """Columns of equal rows side by side: means +- standard errors, or intervals."""
    rows = list(next(iter(columns.values()), ()))
    assert all(list(column) == rows for column in columns.values()), columns
    lines = [[row, *(_cell(column[row]) for column in columns.values())] for row in rows]
    return "\n".join(aligned([["task", *columns], *lines]))


def _cell(value: Estimate | Interval, sign: str = "") -> str:
    if value is None:
        return "not known"
    if isinstance(value, Estimate):
        error = "" if value.standard_error is None else f" +- {value.standard_error:.3f}"
        return f"{value.mean:.3f}{error}"
    low, high = value
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]"


# What a benchmark says of one model, and of two on the same prompts and random streams.


@dataclass(frozen=True)
class Setup:
    """What a benchmark was scored on; equal setups give equal random streams."""

    benchmark: str
    images: str
    """How many there are, or where they are."""
    guidance_scale: float | None = None
    """None, as the following: of images that were not drawn here."""
    seed: int | None = None
    dtype: str | None = None
    """Precision of the sampler: float32 or mixed."""
    scorers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The settings of every reward."""
    temperature: float | None = 1.0
    top_k: int = 0
    """0: tokens were drawn from all, or it is not known."""

    def __str__(self) -> str:
        text = f"{self.benchmark}, {self.images}"
        if self.guidance_scale is None:
            return text
        text += f", guidance {self.guidance_scale:g}"
        if self.temperature != 1:
            text += f", temperature {self.temperature:g}"
        if self.top_k:
            text += f", top-k {self.top_k}"
        return f"{text}, seed {self.seed}, {self.dtype}"


@dataclass(frozen=True)
class Results:
    """Every score of one model, image by image, under the name of its measure."""

    model: str
    setup: Setup
    scores: Mapping[str, tuple[ImageScore, ...]]
    by_task: tuple[str, ...]
    """The measures whose table is printed task by task; of the others only the overall mean is."""
    pooled: bool = False
    """The overall mean is that of all images, not of the tasks."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the published tools print besides."""
    figure_draws: Draws = field(default_factory=dict)
    """Those of the bootstrap, of figures that are made from a judge's answers."""
    overall_row: str = OVERALL
    """What the row of all tasks is called in print."""
    statements: tuple[str, ...] = ()
    """Lines that follow the table: published figures, and in what their protocol is another."""

    @property
    def benchmark(self) -> str:
        return self.setup.benchmark

    @property
    def main_measure(self) -> str:
        """The first that was taken, of those printed by task where there is one of them.

        An InputError where no image has a score.
        """
        taken = (name for name in (*self.by_task, *self.scores) if name in self.scores)
        if (measure := next(taken, None)) is None:
            raise InputError(
                f"{self.benchmark}: no image has a score; the replies of its judge are in the "
                "score files beside the images"
            )
        return measure

    def summary(self, measure: str) -> TaskScores:
        """The scores of a measure by task and overall."""
        scores = self.scores[measure]
        bounds = (0.0, 1.0) if _are_verdicts(scores) else None
        return task_scores(scores, pooled=self.pooled, bounds=bounds)

    def table(self) -> str:
        """All measures as text: mean +- standard error, and bootstrap intervals where they fit."""
        shown = [name for name in self.by_task if name in self.scores]
        columns: dict[str, Mapping[str, Estimate | Interval]] = {}
        for name in shown:
            columns[name] = self.summary(name)
            if name == shown[0]:
                columns["95 % bootstrap"] = self._bootstrap(name)
        others = [name for name in self.scores if name not in self.by_task]
        rows = [[name, _cell(self.summary(name)[OVERALL])] for name in others]
        for name, value in self.figures.items():
            interval = self.figure_interval(name)
            rows.append([name, f"{value:.3f}" + (f" {_cell(interval)}" if interval else "")])
        shown_columns = {
            name: {self.overall_row if row == OVERALL else row: one for row, one in column.items()}
            for name, column in columns.items()
        }
        lines = [f"{self.model}: {self.setup}", "", render_table(shown_columns), ""]
        return "\n".join([*lines, *aligned(rows), *self.statements])

    def figure_interval(self, name: str) -> Interval:
        """The 95 % bootstrap interval of a figure."""
        return interval_of(self.figure_draws.get(name, ()))

    def to_frame(self) -> Any:
        """Every score as a row of a pandas `DataFrame`: measure, task, prompt, image, value."""
        if importlib.util.find_spec("pandas") is None:
            raise InputError(
                "to_frame: pandas is not installed; run pip install 'stage-rl[pandas]'"
            )
        rows = [
            {"measure": measure, **asdict(one)}
            for measure, scores in self.scores.items()
            for one in scores
        ]
        return importlib.import_module("pandas").DataFrame(rows)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return f"<pre>{html.escape(self.table())}</pre>"

    def to_json(self) -> dict[str, Any]:
        """As plain values: summaries, and every score as [prompt, image, value] by task."""
        return {
            "model": self.model,
            **asdict(self.setup),
            "summary": {name: plain_scores(self.summary(name)) for name in self.scores},
            "bootstrap": {name: self._bootstrap(name) for name in self.scores},
            "figures": dict(self.figures),
            "figure_intervals": {name: self.figure_interval(name) for name in self.figures},
            "statements": list(self.statements),
            "scores": {
                name: {
                    task: [[one.prompt, one.image, round(one.value, 6)] for one in rows]
                    for task, rows in _by_task(scores).items()
                }
                for name, scores in self.scores.items()
            },
        }

    def _bootstrap(self, measure: str) -> dict[str, Interval]:
        return bootstrap_intervals(self.scores[measure], pooled=self.pooled)


@dataclass(frozen=True)
class Comparison:
    """A trained model beside its base, judged on the same prompts and random streams."""

    base: Results
    trained: Results

    def __post_init__(self) -> None:
        assert self.base.setup == self.trained.setup, "results of other streams cannot be paired"

    @property
    def benchmark(self) -> str:
        return self.base.benchmark

    def difference(self, measure: str) -> TaskScores:
        """Trained minus base, paired image by image; nothing where no image has it for both."""
        return self._paired(measure)[2]

    def _paired(self, measure: str) -> tuple[TaskScores, TaskScores, TaskScores]:
        """Base, trained, and trained - base, of the images for which both have the measure.

        A prompt can lack one: without any object there is no diversity of objects.
        """
        before = {
            (one.task, one.prompt, one.image): one for one in self.base.scores.get(measure, ())
        }
        after = {
            key: one
            for one in self.trained.scores.get(measure, ())
            if (key := (one.task, one.prompt, one.image)) in before
        }
        olds = [before[key] for key in after]
        changes = [replace(after[key], value=after[key].value - before[key].value) for key in after]
        pooled = self.base.pooled
        bounds = (-1.0, 1.0) if _are_verdicts([*olds, *after.values()]) else None
        return (
            task_scores(olds, pooled=pooled),
            task_scores(after.values(), pooled=pooled),
            task_scores(changes, pooled=pooled, bounds=bounds),
        )

    def table(self) -> str:
        """Base, trained, and their difference with its paired 95 % interval, as text."""
        head = ["base", "trained", "difference", "95 % interval"]
        lines: list[list[str]] = []
        for name in self.base.by_task:
            lines += [[name, *head], *self._rows(name), []]
        others = [name for name in self.trained.scores if name not in self.base.by_task]
        if others or not self.differences:
            lines.append([OVERALL, *head])
        lines += [[name, *cells] for name in others for _, *cells in self._rows(name)[-1:]]
        if self.differences:
            lines += [*([[]] if others else []), ["figures", *head], *self._figure_rows()]
        title = str(self.base.setup)
        if (self.base.model, self.trained.model) != ("base", "trained"):
            title += f": base {self.base.model}, trained {self.trained.model}"
        return "\n".join([title, "", *aligned(lines)])

    @property
    def differences(self) -> Mapping[str, tuple[float, Interval]]:
        """Trained minus base of every figure of a judge's answers, with its paired interval."""
        before, after = self.base.figure_draws, self.trained.figure_draws
        return {
            name: (
                self.trained.figures[name] - self.base.figures[name],
                paired_interval(before[name], after[name]),
            )
            for name in after
            if name in before
        }

    def _figure_rows(self) -> list[list[str]]:
        return [
            [
                name,
                f"{self.base.figures[name]:.3f}",
                f"{self.trained.figures[name]:.3f}",
                f"{change:+.3f}",
                _cell(interval, "+"),
            ]
            for name, (change, interval) in self.differences.items()
        ]

    def _rows(self, measure: str) -> list[list[str]]:
        """A line for each task, and one for all of them."""
        before, after, change = self._paired(measure)
        return [
            [
                self.base.overall_row if row == OVERALL else row,
                f"{before[row].mean:.3f}",
                f"{after[row].mean:.3f}",
                f"{moved.mean:+.3f}",
                _cell(moved.interval, "+"),
            ]
            for row, moved in change.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Both results, and the paired differences of every measure they share."""
        differences = {name: self.difference(name) for name in self.trained.scores}
        return {
            "base": self.base.to_json(),
            "trained": self.trained.to_json(),
            "difference": {name: plain_scores(one) for name, one in differences.items() if one},
            "figures": {
                name: {"mean": change, "interval": interval}
                for name, (change, interval) in self.differences.items()
            },
        }


# How much the images of one prompt differ in code space, on objects and on background.
#
# Shape suffixes: G images of a prompt, T image tokens, C codebook channels, N images, H x W
# pixels.


def object_cells(foreground_NHW: NDArray[np.bool_], grid: tuple[int, int]) -> Tensor:
    """The image tokens whose cell is mostly foreground, NT (bool).

    H and W are multiples of the grid.
    """
    num_images, height, width = foreground_NHW.shape
    rows, columns = grid
    assert height % rows == 0, (height, rows)
    assert width % columns == 0, (width, columns)
    cells = foreground_NHW.reshape(num_images, rows, height // rows, columns, width // columns)
    return torch.from_numpy(cells.mean((2, 4)) > 0.5).flatten(1)


def group_diversity(codes_GTC: Tensor, object_GT: Tensor) -> dict[str, float]:
    """1 - mean cosine over all pairs of a prompt's images, of `background` and of `objects`.

    In [0, 2]. A position is one of an object where either image of the pair shows one there; what
    no pair shows is left out.
    """
    unit_GTC = normalize(codes_GTC.float(), dim=-1)
    cosine_GGT = torch.einsum("itc,jtc->ijt", unit_GTC, unit_GTC)
    object_GGT = object_GT[:, None] | object_GT[None]
    pairs_GG1 = torch.ones(cosine_GGT.shape[:2], dtype=torch.bool).triu(1)[..., None]
    chosen = {"background": pairs_GG1 & ~object_GGT, "objects": pairs_GG1 & object_GGT}
    return {
        name: 1 - float(cosine_GGT[chosen_GGT].mean())
        for name, chosen_GGT in chosen.items()
        if chosen_GGT.any()
    }
