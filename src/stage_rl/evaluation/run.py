"""Runs benchmarks: draws every image once, lets every scorer judge it, and reports.

Files go to one folder, and what is there is not made again:
OUT/setup.json, OUT/images/SET/NNNNN/..., OUT/scores/SET/SCORER-HASH8/NNNNN.json, OUT/NAME.json,
OUT/NAME.png.

Shape suffixes: N images, H x W pixels, C colour channels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stage_rl.config import put_references, references_in
from stage_rl.console import progress, stop_signals
from stage_rl.distributed import SINGLE, World, environment
from stage_rl.errors import InputError, Stopped
from stage_rl.evaluation import published
from stage_rl.evaluation.aggregation import PromptAnswers, prompt_answers, share_missing
from stage_rl.evaluation.before_after import write_before_after, write_picture
from stage_rl.evaluation.figures import figure_draws
from stage_rl.evaluation.folder import FOLDER, check_writable, open_folder, release_folder
from stage_rl.evaluation.images import DrawnPrompt, find_images, planned
from stage_rl.evaluation.needs import missing_data, missing_parts, missing_weights
from stage_rl.evaluation.request import Request, asked_of, recipe_request
from stage_rl.evaluation.results import OVERALL, Comparison, Draws, ImageScore, Results, Setup
from stage_rl.evaluation.scores import ScoreFolder, folder_name, score_images
from stage_rl.evaluation.smoke import IMAGES as SMOKE_IMAGES
from stage_rl.evaluation.smoke import made_up_reward
from stage_rl.evaluation.suites import (
    ALL,
    Scorer,
    Suite,
    check_names,
    find_suite,
    find_suites,
    own_settings,
    scorers_of,
)
from stage_rl.files import replace_text
from stage_rl.policies.base import Policy
from stage_rl.recipe import EvaluationConfig
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.judge import WeightedReward, build_reward
from stage_rl.rewards.threads import RewardsPendingError
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.types import Prompt

IMAGES_AT_ONCE = 64
"""Images after which files are written and a stop is heard."""

MISSING = "answers missing"
"""The figure of the share of answers that could not be read."""

UNSCORED = "images without a score"
"""The figure of the share of images of which an answer could not be read."""


def run_suites(
    load: Callable[[], Policy] | None,
    names: Sequence[str],
    request: Request,
    *,
    model: str,
    world: World = SINGLE,
) -> list[Results]:
    """The results of benchmarks (`all`: the published ones) on a model, or on `request.images`.

    Settings, prompts and `out` are checked before the model is loaded; each of several ranks draws
    and scores its prompts, and all return all results. Raises `Stopped` after Ctrl-C or SIGTERM.
    """
    missing = [suite for suite, _ in _lacking(names, request)]
    suites = [suite for suite in find_suites(names) if suite not in missing]
    check_names(suites, request.scorers)
    jobs = [_job(suite, request) for suite in suites]
    for job in jobs:
        if not job.scorers:
            raise InputError(f"{job.suite.name}: every reward is left out; keep one")
    world.broadcast_object(lambda: check_writable(request.out or FOLDER))
    policy = load() if load is not None else None
    out = open_folder(policy, request, model, world)
    try:
        with stop_signals() as signals:
            run = _Run(policy, request, model, out, world, signals)
            try:
                results = [run.results_of(job) for job in jobs]
            except RewardsPendingError:
                raise run.stopped() from None
            drawn = [run.drawn(job) for job in jobs]
    except BaseException:
        if world.first:
            release_folder(out)
        raise
    made_with = environment(world.size)
    for job, one, prompts in zip(jobs, results, drawn, strict=True) if world.first else ():
        figures = {**one.to_json(), "environment": made_with}
        text = json.dumps(figures, allow_nan=False, indent=1)
        replace_text(out / f"{one.benchmark}.json", text + "\n")
        if policy is not None:
            tasks = [job.suite.task_of(prompt.prompt) for prompt in prompts]
            write_picture(out / f"{one.benchmark}.png", one, prompts, tasks)
    return results


def skipped(names: Sequence[str], request: Request) -> list[str]:
    """The benchmarks of `all` that cannot be run, each with what is missing."""
    return [f"{suite.name} is not run: {why}" for suite, why in _lacking(names, request)]


def _lacking(names: Sequence[str], request: Request) -> list[tuple[Suite, str]]:
    """Of `all`, those whose prompts or programs cannot be found, or whose judge would be
    downloaded first.
    """
    lacking: list[tuple[Suite, str]] = []
    for suite in [] if request.smoke else find_suites(names):
        if suite.name not in ALL or suite.name in names:
            continue
        if (why := missing_data(suite, request.data)) is not None:
            lacking.append((suite, why))
        elif absent := _missing_here(suite, request):
            lacking.append((suite, f"{absent[0]} is not on this machine"))
    return lacking


def _missing_here(suite: Suite, request: Request) -> list[str]:
    try:
        judges = missing_weights(suite, request.scorers) if suite.aggregate is not None else []
        return [*judges, *missing_parts(suite, request.scorers)]
    except InputError:
        return []  # it is run, and says so


def run_suite(
    policy: Policy,
    benchmark: str,
    request: Request,
    *,
    model: str = "policy",
    engine: Engine | None = None,
    silent: bool = False,
    signals: Sequence[int] = (),
) -> Results:
    """The results of one benchmark; keeps no files and goes on after `signals` to its end.

    But a reward that then gives no answer is a `RewardsPendingError`. `engine` None is one of its
    own; another draws by the weights of its last reload.
    """
    job = _job(find_suite(benchmark), request)
    with TemporaryDirectory() as out:
        run = _Run(
            *(policy, request, model, Path(out)),
            signals=signals,
            engine=engine,
            silent=silent,
            ends_early=False,
        )
        return run.results_of(job)


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Finds what is wrong with a recipe's benchmark, its prompts and its scorers; loads no model.

    A `StageError` says what.
    """
    suite = find_suite(evaluation.benchmark)
    request = recipe_request(evaluation, validation=True)
    check_names([suite], request.scorers)
    if not _job(suite, request).scorers:
        raise InputError("evaluation.scorers: leaves every reward out; keep one")


def compare_policies(
    before: Policy,
    after: Policy,
    *,
    evaluation: EvaluationConfig,
    out: Path,
) -> str:
    """Judges a run's policy before and after on the same streams; the printed comparison.

    Writes evaluation.json, before_after.png and before_after.json to `out`.
    """
    request = recipe_request(evaluation)
    job = _job(find_suite(evaluation.benchmark), request)
    with TemporaryDirectory() as kept:
        runs = [
            _Run(policy, request, name, Path(kept) / name)
            for policy, name in ((before, "base"), (after, "trained"))
        ]
        comparison = Comparison(*(run.results_of(job) for run in runs))
        pairs = list(zip(*(run.drawn(job) for run in runs), strict=True))
        tasks = [job.suite.task_of(one.prompt) for one, _ in pairs]
        figures = {"asked": asked_of(evaluation), **comparison.to_json()}
        replace_text(out / "evaluation.json", json.dumps(figures, allow_nan=False))
        write_before_after(out, comparison, pairs, tasks)
    return comparison.table()


@dataclass(frozen=True)
class _Job:
    """One benchmark with its prompts, how many images each has, and its scorers."""

    suite: Suite
    prompts: Sequence[Prompt]
    num_images: Sequence[int]
    images: str
    """How many there are, in words."""
    scorers: Mapping[str, tuple[Scorer, RewardConfig]]
    made_up: frozenset[str]
    """The scorers that give way to made-up scores."""

    def asked(self, prompt: Prompt) -> list[str]:
        """The scorers of a prompt."""
        return [name for name, (scorer, _) in self.scorers.items() if scorer.asks(prompt)]


def _job(suite: Suite, request: Request) -> _Job:
    prompts = suite.prompt_set.prompts(request.data, smoke=request.smoke)
    scorers = scorers_of(suite, request.scorers, smoke=request.smoke)
    has_made_up = request.smoke and suite.prompt_set.has_smoke_prompts
    made_up = frozenset(suite.scorers if has_made_up else ())
    for name, (scorer, config) in scorers.items():
        for prompt in prompts:
            reason = config.unsupported_reason(prompt) if scorer.asks(prompt) else None
            if reason and name not in made_up:
                raise InputError(
                    f"{suite.name}: {name} {reason} ('{prompt.text[:40]}'); "
                    f"leave it out: {name}=null"
                )
    most = SMOKE_IMAGES if suite.images_per_task else min(SMOKE_IMAGES, suite.images_per_prompt)
    own = most if request.smoke else None
    per_task = request.images_per_task or own or suite.images_per_task
    if suite.images_per_task is None and (request.images_per_prompt or not request.images_per_task):
        number = request.images_per_prompt or own or suite.images_per_prompt
        images = f"{len(prompts)} of {len(prompts)} prompts, {number} of each"
        num_images = [number] * len(prompts)
    else:
        assert per_task is not None
        images = f"{per_task} images per task"
        num_images = _spread_evenly([suite.task_of(prompt) for prompt in prompts], per_task)
    return _Job(suite, prompts, num_images, images, scorers, made_up)


def _spread_evenly(tasks: Sequence[str], per_task: int) -> list[int]:
    """Images of each prompt, given its task; the first of a task have one more where they must."""
    counts, placed = Counter(tasks), Counter[str]()
    num_images = []
    for task in tasks:
        num_images.append(-(-(per_task - placed[task]) // counts[task]))
        placed[task] += 1
    return num_images


@dataclass(frozen=True)
class _Run:
    """One call: what images are drawn with, and where files go."""

    policy: Policy | None
    request: Request
    model: str
    out: Path
    world: World = SINGLE
    signals: Sequence[int] = ()
    engine: Engine | None = None
    silent: bool = False
    ends_early: bool = True
    """Whether a signal ends it between batches; else only where a reward gives no answer."""

    def stopped(self) -> Stopped:
        """What ends it after a signal."""
        text = f"{self.out}: stopped; run the same command again to go on"
        return Stopped(text, signal_number=self.signals[0])

    def results_of(self, job: _Job) -> Results:
        """Draws and scores what is missing of a benchmark, and reports all of it."""
        suite = job.suite
        drawn = self.drawn(job)
        folders = self._scored(job, drawn)
        scores = _image_scores(job, drawn, folders)
        main = scores.get(suite.by_task[0], ())
        figures, draws = dict(suite.figures_of(main)) if main else {}, {}
        if suite.aggregate is not None and suite.answers in folders:
            found, draws = self._aggregated(job, drawn, folders[suite.answers])
            number = sum(len(one.files) for one in drawn)
            figures |= {**found, UNSCORED: 1 - len(main) / number if number else 0.0}
        results = Results(
            model=self.model,
            setup=self._setup(job, drawn),
            scores=scores,
            by_task=suite.by_task,
            pooled=suite.pooled,
            figures=figures,
            figure_draws=draws,
            overall_row=OVERALL if suite.aggregate is None else "mean of images",
        )
        return replace(results, statements=tuple(self._statements(job, drawn, results)))

    def _aggregated(
        self, job: _Job, drawn: Sequence[DrawnPrompt], folder: ScoreFolder
    ) -> tuple[dict[str, float], Draws]:
        """The figures of a judge's answers, and how they spread."""
        assert job.suite.aggregate is not None
        rows, draws = _answers(drawn, folder), {}
        if not self.silent:
            tasks = [job.suite.task_of(one.prompt) for one in drawn]
            draws = figure_draws(rows, tasks, job.suite.aggregate)
        return {**job.suite.aggregate(rows), MISSING: share_missing(rows)}, draws

    def _setup(self, job: _Job, drawn: Sequence[DrawnPrompt]) -> Setup:
        scorers = {
            name: put_references(
                config.model_dump(mode="json"), references_in(self.request.scorers.get(name))
            )
            for name, (_, config) in job.scorers.items()
        }
        if self.policy is None or self.request.images is not None:
            number = sum(len(one.files) for one in drawn)
            images = f"{len(drawn)} of {len(job.prompts)} prompts, {number} images of "
            images += str(self.request.images)
            return Setup(job.suite.name, images, scorers=scorers, temperature=None)
        sampling = self.request.sampling(job.suite, self.policy)
        return Setup(
            benchmark=job.suite.name,
            images=job.images,
            guidance_scale=sampling.guidance_scale,
            seed=self.request.seed,
            dtype=self.request.dtype,
            scorers=scorers,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
        )

    def _statements(
        self, job: _Job, drawn: Sequence[DrawnPrompt], results: Results
    ) -> Sequence[str]:
        """Published figures beside ours, and in what the protocols differ."""
        departures = published.departures(
            results.setup,
            others=self._other_images(job, drawn),
            smoke=self.request.smoke,
            scorers={name: config for name, (_, config) in job.scorers.items()},
            own=own_settings(job.suite, job.scorers),
            missing=results.figures.get(UNSCORED, 0.0),
        )
        means: dict[str, Mapping[str, float]] = {
            name: {row: score.mean for row, score in results.summary(name).items()}
            for name in results.scores
        }
        means[published.FIGURES] = results.figures
        return published.statements(job.suite.name, means, departures, smoke=self.request.smoke)

    def _other_images(self, job: _Job, drawn: Sequence[DrawnPrompt]) -> list[str]:
        """In what these are not the images that the benchmark asks for, in words."""
        suite, reasons = job.suite, []
        is_complete = (
            len(drawn) == len(job.prompts)
            and (suite.aggregate is None or len(drawn) == suite.prompt_set.size)
            and all(len(one.files) == suite.images_per_prompt for one in drawn)
        )
        if not is_complete:
            reasons.append("not all images of the benchmark are there")
        other = suite.prompt_set.unlike_published(self.request.data)
        return reasons if other is None or self.request.smoke else [*reasons, other]

    def drawn(self, job: _Job) -> list[DrawnPrompt]:
        """The prompts with their images; those of this rank are drawn where they are missing."""
        if self.request.images is not None:
            return find_images(self.request.images, job.prompts, job.suite.name)
        root = self.out / "images" / job.suite.prompt_set.name
        has_measures = job.suite.measures_of_groups is not None
        drawn = [
            planned(root, place, prompt, num_images=number, has_measures=has_measures)
            for place, (prompt, number) in enumerate(zip(job.prompts, job.num_images, strict=True))
            if number
        ]
        mine = drawn[self.world.rank :: self.world.size]
        if not all(one.is_complete for one in mine):
            self._draw(job, mine)
        self.world.wait()
        return drawn

    def _draw(self, job: _Job, mine: Sequence[DrawnPrompt]) -> None:
        """Image k of a prompt has the same stream whatever else is drawn."""
        assert self.policy is not None
        engine = self.engine or Engine(self.policy, dtype=self.request.dtype)
        is_by_task = job.suite.images_per_task is not None

        def alike(one: DrawnPrompt) -> tuple[str, int]:
            # The bits of bf16 layers depend on what is drawn together: there, one task.
            return job.suite.task_of(one.prompt) if is_by_task else "", len(one.files)

        label = f"draw {job.suite.prompt_set.name}"
        lacking = [one for one in mine if not one.is_complete]
        for some in self._batches(label, mine, lacking, alike):
            drawn = rollout(
                engine,
                [one.prompt for one in some],
                group_size=len(some[0].files),
                sampling=self.request.sampling(job.suite, self.policy),
                seed=self.request.seed,
                step=0,
            )
            measures = job.suite.measures_of_groups
            of_groups = measures(self.policy, drawn) if measures else [None] * len(some)
            groups = drawn.images_NHWC.unflatten(0, (len(some), -1))
            for one, images_GHWC, numbers in zip(some, groups, of_groups, strict=True):
                one.write(images_GHWC, numbers)

    def _scored(self, job: _Job, drawn: Sequence[DrawnPrompt]) -> dict[str, ScoreFolder]:
        """Every scorer's folder, with the scores of this rank's prompts, then of all."""
        root = self.out / "scores" / job.suite.prompt_set.name
        folders = {}
        for name, (scorer, config) in job.scorers.items():
            made_up = name in job.made_up
            which = f"{name}-smoke" if made_up else folder_name(config)
            folders[name] = folder = ScoreFolder(root / which, config)
            mine = drawn[self.world.rank :: self.world.size]
            asked = [one for one in mine if scorer.asks(one.prompt)]
            lacking = [one for one in asked if folder.read(one) is None]
            if not lacking:
                continue
            item = (
                WeightedReward(name, 1.0, made_up_reward(name, scorer.verdicts, config))
                if made_up
                else replace(build_reward(config, self._device), name=name)
            )
            label = f"{job.suite.name}: {name}"
            for some in self._batches(label, asked, lacking, lambda one: len(one.files)):
                score_images(item, some, folder, signals=self.signals)
            del item  # the next one may need all of the memory
        self.world.wait()
        return folders

    @property
    def _device(self) -> torch.device:
        if self.policy is not None:
            return self.policy.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def _batches(
        self,
        label: str,
        all_of_them: Sequence[DrawnPrompt],
        lacking: Sequence[DrawnPrompt],
        alike: Callable[[DrawnPrompt], Any],
    ) -> Iterator[list[DrawnPrompt]]:
        """Prompts that lack something, a few that are alike at a time, until a signal is there."""
        numbers = [len(one.files) for one in all_of_them]
        missing = [len(one.files) for one in lacking]
        bar = progress(label, sum(numbers)) if not self.silent else nullcontext(lambda _: None)
        with bar as advance:
            advance(sum(numbers) - sum(missing))
            for _, same in groupby(sorted(lacking, key=alike), alike):
                rest = list(same)
                number = len(rest[0].files)
                step = max(1, IMAGES_AT_ONCE // number)
                for first in range(0, len(rest), step):
                    if self.signals and self.ends_early:
                        raise self.stopped()
                    yield rest[first : first + step]
                    advance(number * len(rest[first : first + step]))


def _image_scores(
    job: _Job, drawn: Sequence[DrawnPrompt], folders: Mapping[str, ScoreFolder]
) -> dict[str, tuple[ImageScore, ...]]:
    """Every measure of every image, in the order of the prompts."""
    suite = job.suite
    measures: dict[str, list[ImageScore]] = {name: [] for name in (*suite.by_task, *suite.overall)}
    for one in drawn:
        read = {name: folders[name].read(one) for name in job.asked(one.prompt)}
        for image in range(len(one.files)):
            scores = {name: given[image] for name, given in read.items() if given is not None}
            assert len(scores) == len(read), "every image has been scored"
            found = dict(suite.measures_of(one.prompt, scores))
            if image == 0:
                found |= one.read_measures() or {}
            for measure, value in found.items():
                score = ImageScore(suite.task_of(one.prompt), one.prompt.index, image, value)
                measures.setdefault(measure, []).append(score)
    return {name: tuple(scores) for name, scores in measures.items() if scores}


def _answers(drawn: Sequence[DrawnPrompt], folder: ScoreFolder) -> list[PromptAnswers]:
    """What a judge said, prompt by prompt, from the files that it was kept in."""
    return [
        prompt_answers(one.prompt, scores)
        for one in drawn
        if (scores := folder.read(one)) is not None
    ]
