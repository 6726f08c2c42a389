"""What a benchmark says of one model, and of two on the same prompts and random streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stage_rl.evaluation.results import (
    Estimate,
    ImageScore,
    TaskScores,
    bootstrap_intervals,
    paired_difference,
    render_table,
    task_scores,
)


@dataclass(frozen=True)
class Setup:
    """How the images of a benchmark are made; equal setups give equal random streams."""

    benchmark: str
    images_per_task: int
    guidance_scale: float
    seed: int
    dtype: str
    """Precision of the sampler: float32 or mixed."""

    def __str__(self) -> str:
        return (
            f"{self.benchmark}, {self.images_per_task} images per task, "
            f"guidance {self.guidance_scale:g}, seed {self.seed}, {self.dtype}"
        )


@dataclass(frozen=True)
class SuiteSetup:
    """What a published benchmark was scored on; equal setups give equal random streams."""

    benchmark: str
    prompts: str
    """Of the set, how many have images: 553 of 553."""
    images: str
    """How they were made, or where they are."""
    scorers: Mapping[str, Mapping[str, Any]]
    """The settings of every reward."""

    def __str__(self) -> str:
        return f"{self.benchmark}, {self.prompts} prompts, {self.images}"


@dataclass(frozen=True)
class Results:
    """Every score of one model, image by image, under the name of its measure."""

    model: str
    setup: Setup | SuiteSetup
    scores: Mapping[str, tuple[ImageScore, ...]]
    by_task: tuple[str, ...]
    """The measures whose table is printed task by task; of the others only the overall mean is."""
    pooled: bool = False
    """The overall mean is that of all images, not of the tasks."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What the published tools print besides."""
    statements: tuple[str, ...] = ()
    """Lines that follow the table: published rows, and what is not comparable and why."""

    @property
    def benchmark(self) -> str:
        """Its name."""
        return self.setup.benchmark

    def summary(self, measure: str) -> TaskScores:
        """The scores of a measure by task and overall."""
        return task_scores(self.scores[measure], pooled=self.pooled)

    def table(self) -> str:
        """All measures as text: mean +- standard error, and bootstrap intervals where they fit."""
        shown = [name for name in self.by_task if name in self.scores]
        first = {shown[0]: self._bootstrap(shown[0])} if shown else {}
        tasks = render_table({name: self.summary(name) for name in shown}, intervals=first)
        others = [name for name in self.scores if name not in self.by_task]
        rows = [[name, _cell(self.summary(name).overall)] for name in others]
        rows += [[name, f"{value:.3f}"] for name, value in self.figures.items()]
        lines = [f"{self.model}: {self.setup}", "", tasks, "", *_aligned(rows), *self.statements]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain values: summaries, and every score as [prompt, image, value] by task."""
        return {
            "model": self.model,
            **asdict(self.setup),
            "summary": {name: self.summary(name).to_json() for name in self.scores},
            "bootstrap": {name: self._bootstrap(name) for name in self.scores},
            "figures": dict(self.figures),
            "statements": list(self.statements),
            "scores": {name: _by_task(rows) for name, rows in self.scores.items()},
        }

    def _bootstrap(self, measure: str) -> dict[str, tuple[float, float] | None]:
        return bootstrap_intervals(self.scores[measure], pooled=self.pooled)


@dataclass(frozen=True)
class Comparison:
    """A trained model beside its base, judged on the same prompts and random streams."""

    base: Results
    trained: Results

    @property
    def benchmark(self) -> str:
        """Its name."""
        return self.base.benchmark

    def difference(self, measure: str) -> TaskScores | None:
        """Trained minus base, paired; None where no prompt has the measure for both.

        A prompt can lack one: without any object there is no diversity of objects.
        """
        before, after = self._shared(measure)
        if not after:
            return None
        return task_scores(paired_difference(after, before), pooled=self.base.pooled)

    def _shared(self, measure: str) -> tuple[list[ImageScore], list[ImageScore]]:
        """The scores of base and trained of the images for which both have the measure."""
        before, after = (
            {(one.task, one.prompt, one.image): one for one in results.scores[measure]}
            for results in (self.base, self.trained)
        )
        shared = [key for key in after if key in before]
        return [before[key] for key in shared], [after[key] for key in shared]

    def table(self) -> str:
        """Base, trained, and their difference with its paired 95 % interval, as text."""
        head = ["base", "trained", "difference", "95 % interval"]
        lines: list[list[str]] = []
        for name in self.base.by_task:
            lines += [[name, *head], *self._rows(name, by_task=True), []]
        others = [name for name in self.trained.scores if name not in self.base.by_task]
        lines += [["overall", *head]]
        lines += [row for name in others for row in self._rows(name, by_task=False)]
        names = f"base {self.base.model}, trained {self.trained.model}"
        return "\n".join([f"{self.base.setup}: {names}", "", *_aligned(lines)])

    def to_json(self) -> dict[str, Any]:
        """Both results, and the paired differences of every measure they share."""
        differences = {name: self.difference(name) for name in self._measures}
        return {
            "base": self.base.to_json(),
            "trained": self.trained.to_json(),
            "difference": {
                name: scores.to_json() for name, scores in differences.items() if scores is not None
            },
        }

    @property
    def _measures(self) -> list[str]:
        return [name for name in self.trained.scores if name in self.base.scores]

    def _rows(self, measure: str, *, by_task: bool) -> list[list[str]]:
        change = self.difference(measure) if measure in self._measures else None
        if change is None:
            return []
        # Of the shared images alone, so that trained minus base is the difference beside them.
        before, after = (
            task_scores(scores, pooled=self.base.pooled) for scores in self._shared(measure)
        )
        rows = [(measure if not by_task else "overall", before.overall, after.overall)]
        differences = [change.overall]
        if by_task:
            rows[:0] = [(task, before.tasks[task], after.tasks[task]) for task in change.tasks]
            differences[:0] = change.tasks.values()
        return [
            [name, f"{old.mean:.3f}", f"{new.mean:.3f}", f"{moved.mean:+.3f}", _interval(moved)]
            for (name, old, new), moved in zip(rows, differences, strict=True)
        ]


def compare(base: Results, trained: Results) -> Comparison:
    """Pairs two results; their setups must be equal, or the streams are not the same."""
    assert base.setup == trained.setup, "results of different setups cannot be paired"
    return Comparison(base, trained)


def _cell(row: Estimate) -> str:
    error = "" if row.standard_error is None else f" +- {row.standard_error:.3f}"
    return f"{row.mean:.3f}{error}"


def _interval(row: Estimate) -> str:
    if row.interval is None:
        return "not known"
    return "[{:+.3f}, {:+.3f}]".format(*row.interval)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    filled = [row for row in rows if row]
    columns = max((len(row) for row in filled), default=0)
    widths = [max(len(row[i]) for row in filled if len(row) > i) for i in range(columns)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in rows
    ]


def _by_task(rows: Iterable[ImageScore]) -> dict[str, list[list[float]]]:
    tasks: dict[str, list[list[float]]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append([row.prompt, row.image, round(row.value, 6)])
    return tasks
