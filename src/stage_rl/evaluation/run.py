"""Benchmarks by name: one model, or a trained one against its base."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from stage_rl.console import progress, stop_signals
from stage_rl.distributed import SINGLE, World, init_distributed
from stage_rl.errors import InputError, RewardError, StageError, Stopped
from stage_rl.evaluation import published
from stage_rl.evaluation.images import DrawnPrompt, ImageFolder, find_images, read_images
from stage_rl.evaluation.results import Comparison, ImageScore, Results, Setup, SuiteSetup, compare
from stage_rl.evaluation.smoke import IMAGES_PER_PROMPT
from stage_rl.evaluation.suites import (
    SUITES,
    WHERE,
    Overrides,
    Scorer,
    Suite,
    check_names,
    chosen,
    is_there,
    more_figures,
    prompts_of,
    scorers_of,
)
from stage_rl.files import replace_file, replace_text
from stage_rl.pictures import side_by_side
from stage_rl.policies.base import Policy, base_digest
from stage_rl.recipe import EvaluationConfig
from stage_rl.rewards.base import Reward, RewardConfig, Score
from stage_rl.rewards.judge import check_scores
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.settings import near_or_all
from stage_rl.shapes import suite as shapes_geneval
from stage_rl.types import Prompt, Rollout

BENCHMARKS = {shapes_geneval.NAME: shapes_geneval}

IMAGES_IN_GRID = 4
"""Images of each prompt and policy in the before/after grid."""


def evaluate(
    model: str | Path | Policy,
    benchmark: str = shapes_geneval.NAME,
    *,
    images_per_task: int = 400,
    guidance_scale: float | None = None,
    seed: int = 0,
    dtype: str = "mixed",
    device: str | torch.device | None = None,
) -> Results:
    """Scores a model on a benchmark; image k of a prompt has the same stream for every model.

    `model` is a folder, a hub id, `shapes`, a run folder or RUN@STEP, or a policy. `guidance_scale`
    None is the benchmark's own; `device` None is the GPU where there is one. `images_per_task` is
    for shapes-geneval; the published benchmarks say themselves how many images they need, and
    `evaluate_suites` takes what they can be told. Wrong input is an `InputError`.
    """
    if benchmark in SUITES:
        request = Request(guidance_scale=guidance_scale, seed=seed, dtype=dtype)
        return evaluate_suites(model, [benchmark], request, device=device)[0]
    setup = _setup(benchmark, images_per_task, guidance_scale, seed=seed, dtype=dtype)
    return _run(_load(model, device), setup, name=_name(model))


def evaluate_suites(
    model: str | Path | Policy | None,
    benchmarks: Sequence[str],
    request: Request,
    *,
    device: str | torch.device | None = None,
) -> list[Results]:
    """Scores a model, or with None the images of `request.images`, on published benchmarks.

    Under `torchrun` every process takes its share of the prompts, and all get all results.
    """
    best = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = None if model is None else functools.partial(_load, model, best)
    name = str(request.images) if model is None else _name(model)
    with init_distributed(best) as ranks:
        return run_suites(load, benchmarks, request, model=name, ranks=ranks)


def compare_suites(
    model: str | Path | Policy,
    base: str | Path | Policy,
    benchmarks: Sequence[str],
    request: Request,
) -> list[Comparison]:
    """Scores a model and its base by `evaluate_suites`, for paired differences.

    A folder that is asked for holds both, under `model` and `base`.
    """
    results = [
        evaluate_suites(one, benchmarks, replace(request, out=request.out and request.out / part))
        for one, part in ((base, "base"), (model, "model"))
    ]
    return [compare(*pair) for pair in zip(*results, strict=True)]


def evaluate_against(
    model: str | Path | Policy,
    base: str | Path | Policy,
    benchmark: str = shapes_geneval.NAME,
    *,
    images_per_task: int = 400,
    guidance_scale: float | None = None,
    seed: int = 0,
    dtype: str = "mixed",
) -> Comparison:
    """Scores a model and its base on the same streams, for paired differences; see `evaluate`."""
    if benchmark in SUITES:
        request = Request(guidance_scale=guidance_scale, seed=seed, dtype=dtype)
        return compare_suites(model, base, [benchmark], request)[0]
    setup = _setup(benchmark, images_per_task, guidance_scale, seed=seed, dtype=dtype)
    # Both first: a wrong name is answered before the long work.
    policies = [_load(one, None) for one in (base, model)]
    results = [
        _run(policy, setup, name=_name(one))
        for policy, one in zip(policies, (base, model), strict=True)
    ]
    return compare(*results)


def evaluate_run(
    before: Policy,
    after: Policy,
    *,
    evaluation: EvaluationConfig,
    guidance_scale: float,
    out: Path,
) -> str:
    """Judges a run's policy before and after on the same streams; the printed comparison.

    Writes evaluation.json and before_after.png to `out`. `guidance_scale` is that of the rollout,
    for an evaluation that names none.
    """
    own = evaluation.guidance_scale
    setup = _setup(
        evaluation.benchmark,
        evaluation.images_per_task,
        guidance_scale if own is None else own,
        seed=evaluation.seed,
    )
    base, trained = _run(before, setup, name="base"), _run(after, setup, name="trained")
    comparison = compare(base, trained)
    replace_text(out / "evaluation.json", json.dumps(comparison.to_json(), allow_nan=False))
    drawn = [_examples(policy, setup) for policy in (before, after)]
    grid = side_by_side(
        *(one.images_NHWC for one in drawn),
        columns=IMAGES_IN_GRID,
        titles=[prompt.text for prompt in drawn[0].prompts],
        heads=("base", "trained"),
    )
    replace_file(out / "before_after.png", grid.save)
    return comparison.table()


def evaluation_prompts(benchmark: str) -> tuple[Prompt, ...]:
    """All prompts of a benchmark that a run may be compared on."""
    return tuple(p for prompts in BENCHMARKS[benchmark].prompt_sets().values() for p in prompts)


def _load(model: str | Path | Policy, device: str | torch.device | None) -> Policy:
    if not isinstance(model, str | Path):
        return model
    from stage_rl.api import load

    return load(model, device)


def _name(model: str | Path | Policy) -> str:
    return str(model) if isinstance(model, str | Path) else "policy"


def _setup(
    benchmark: str,
    images_per_task: int,
    guidance_scale: float | None,
    *,
    seed: int,
    dtype: str = "mixed",
) -> Setup:
    if benchmark not in BENCHMARKS:
        hint = near_or_all(benchmark, [*BENCHMARKS, *SUITES])
        raise InputError(f"benchmark: unknown '{benchmark}'; {hint}")
    for name, value, least in (("images_per_task", images_per_task, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: {value} is out of range; write at least {least}")
    scale = BENCHMARKS[benchmark].GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    return Setup(benchmark, images_per_task, scale, seed, dtype)


def _run(policy: Policy, setup: Setup, *, name: str) -> Results:
    benchmark = BENCHMARKS[setup.benchmark]
    with progress(f"evaluate {name}", benchmark.num_images(setup.images_per_task)) as advance:
        return benchmark.run(policy, setup, name=name, advance=advance)


def _examples(policy: Policy, setup: Setup) -> Rollout:
    """The first images of some prompts, as the benchmark draws them."""
    return rollout(
        Engine(policy, dtype=setup.dtype),
        BENCHMARKS[setup.benchmark].example_prompts(),
        group_size=IMAGES_IN_GRID,
        sampling=Sampling(guidance_scale=setup.guidance_scale),
        seed=setup.seed,
        step=0,
    )


# Runs published benchmarks: draws every image once, lets every reward score it, and reports.
#
# Files go to one folder, and what is there is not made again:
# OUT/setup.json, OUT/images/SET/NNNNN/..., OUT/scores/SET/SCORER-HASH8/NNNNN.json, OUT/NAME.json.


Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """What to draw, with what to score it, and where everything goes."""

    out: Path | None = None
    """None: evaluations/MODEL-HASH8, by model, weights and way of sampling."""
    data: Path | None = None
    """Folder of the published prompt sets, or one of them."""
    images: Path | None = None
    """Images made elsewhere, in place of a model."""
    images_per_prompt: int | None = None
    """None: as the benchmark has it."""
    guidance_scale: float | None = None
    """None: that of the paper."""
    seed: int = 0
    dtype: str = "mixed"
    smoke: bool = False
    """A few prompts of the shapes world and tiny random scorers."""
    scorers: Overrides = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The guidance scale."""
        own = self.guidance_scale
        return published.GUIDANCE_SCALE if own is None else own


@dataclass(frozen=True)
class _Job:
    """One benchmark with its prompts and scorers."""

    suite: Suite
    prompts: tuple[Prompt, ...]
    num_images: int
    scorers: Mapping[str, tuple[Scorer, RewardConfig]]


def run_suites(
    load: Callable[[], Policy] | None,
    names: Sequence[str],
    request: Request,
    *,
    model: str,
    ranks: World = SINGLE,
) -> list[Results]:
    """The results of benchmarks (`all`: every one) on a model, or on `request.images`.

    Settings and prompts are checked before the model is loaded; each of several ranks draws and
    scores its prompts, and all return all results. Raises `Stopped` after Ctrl-C or SIGTERM.
    """
    suites = [suite for suite in chosen(names) if not _is_skipped(suite, names, request)]
    check_names(suites, request.scorers)
    jobs = [_job(suite, request) for suite in suites]
    policy = load() if load is not None else None
    out = _open(policy, request, model, ranks)
    with stop_signals() as signals:
        run = _Run(policy, request, model, out, ranks, signals)
        results = [run.results_of(job) for job in jobs]
    for done in results if ranks.first else ():
        text = json.dumps(done.to_json(), allow_nan=False, indent=1)
        replace_text(out / f"{done.benchmark}.json", text + "\n")
    return results


def skipped(names: Sequence[str], request: Request) -> list[str]:
    """The benchmarks of `all` whose prompts cannot be found, each with what is missing."""
    return [
        f"{suite.name} is not run: --data has no {WHERE[suite.prompt_set]}"
        for suite in chosen(names)
        if _is_skipped(suite, names, request)
    ]


def _is_skipped(suite: Suite, names: Sequence[str], request: Request) -> bool:
    asked_for = suite.name in names or request.smoke
    return not asked_for and not is_there(suite.prompt_set, request.data)


def _job(suite: Suite, request: Request) -> _Job:
    prompts = prompts_of(suite.prompt_set, request.data, smoke=request.smoke)
    own = IMAGES_PER_PROMPT if request.smoke else suite.images_per_prompt
    scorers = scorers_of(suite, request.scorers, tiny=request.smoke)
    for name, (scorer, config) in scorers.items():
        for prompt in prompts:
            unsupported_reason = config.unsupported_reason(prompt) if scorer.asks(prompt) else None
            if unsupported_reason:
                raise InputError(
                    f"{suite.name}: {name} {unsupported_reason} ('{prompt.text[:40]}'); "
                    f"leave it out: {name}=null"
                )
    return _Job(suite, prompts, request.images_per_prompt or own, scorers)


@dataclass(frozen=True)
class _Run:
    """One call: what images are drawn with, and where files go."""

    policy: Policy | None
    request: Request
    model: str
    out: Path
    ranks: World
    signals: Sequence[int]

    def results_of(self, job: _Job) -> Results:
        """Draws and scores what is missing of a benchmark, and reports all of it."""
        drawn = self._images_of(job)
        folders = self._score(job, drawn)
        scores = _image_scores(job, drawn, folders)
        main = scores.get(job.suite.by_task[0], ())
        rows = [(one.task, one.prompt, one.value) for one in main]
        conditions = _conditions(job, drawn, self.request)
        return Results(
            model=self.model,
            setup=_suite_setup(job, drawn, self.request),
            scores=scores,
            by_task=job.suite.by_task,
            pooled=job.suite.pooled,
            figures=more_figures(job.suite, rows) if rows else {},
            statements=tuple(published.statements(job.suite.name, conditions, scores)),
        )

    def _images_of(self, job: _Job) -> list[DrawnPrompt]:
        """The prompts with their images; those of this rank are drawn where they are missing."""
        request, suite, number = self.request, job.suite, job.num_images
        if request.images is not None:
            return find_images(request.images, job.prompts, suite.name)
        assert self.policy is not None
        folder = ImageFolder(self.out / "images" / suite.prompt_set)
        places = list(enumerate(job.prompts))
        mine = self._share(places)
        if any(folder.missing(place, number) for place, _ in mine):
            engine = Engine(self.policy, dtype=request.dtype)
            painter = Painter(engine, Sampling(request.scale), request.seed)
            with progress(f"draw {suite.prompt_set}", number * len(mine)) as advance:
                painter.draw_missing(folder, mine, number, advance=advance, signals=self.signals)
        self.ranks.wait()
        return [folder.drawn(place, prompt, number) for place, prompt in places]

    def _score(self, job: _Job, drawn: Sequence[DrawnPrompt]) -> dict[str, ScoreFolder]:
        """Every scorer's folder, with the scores of this rank's prompts, then of all."""
        device = self.policy.device if self.policy is not None else _best_device()
        root = self.out / "scores" / job.suite.prompt_set
        folders = {name: ScoreFolder(root, config) for name, (_, config) in job.scorers.items()}
        for name, (scorer, _) in job.scorers.items():
            mine = [one for one in self._share(drawn) if scorer.asks(one.prompt)]
            number = sum(len(one.files) for one in mine)
            with progress(f"{job.suite.name}: {name}", number) as advance:
                score_missing(
                    folders[name], mine, device=device, advance=advance, signals=self.signals
                )
        self.ranks.wait()
        return folders

    def _share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those of this rank, of items that need not split evenly."""
        return items[self.ranks.rank :: self.ranks.size]


def _conditions(job: _Job, drawn: Sequence[DrawnPrompt], request: Request) -> published.Conditions:
    enough = all(len(one.files) == job.suite.images_per_prompt for one in drawn)
    return published.Conditions(
        guidance_scale=None if request.images is not None else request.scale,
        complete=enough and len(drawn) == len(job.prompts),
        smoke=request.smoke,
        scorers={name: config for name, (_, config) in job.scorers.items()},
        left_out=tuple(name for name in job.suite.scorers if name not in job.scorers),
    )


def _image_scores(
    job: _Job, drawn: Sequence[DrawnPrompt], folders: Mapping[str, ScoreFolder]
) -> dict[str, tuple[ImageScore, ...]]:
    """Every measure of every image, in the order of the prompts."""
    measures: dict[str, list[ImageScore]] = {}
    for one in drawn:
        asked = [name for name, (scorer, _) in job.scorers.items() if scorer.asks(one.prompt)]
        read = {name: folders[name].read(one) for name in asked}
        for image in range(len(one.files)):
            given = {name: scores[image] for name, scores in read.items() if scores is not None}
            assert len(given) == len(asked), "every image has been scored"
            for measure, value in job.suite.measures_of(one.prompt, given).items():
                score = ImageScore(job.suite.task_of(one.prompt), one.prompt.index, image, value)
                measures.setdefault(measure, []).append(score)
    return {name: tuple(scores) for name, scores in measures.items()}


def _suite_setup(job: _Job, drawn: Sequence[DrawnPrompt], request: Request) -> SuiteSetup:
    images = f"{job.num_images} of each, guidance {request.scale:g}, "
    images += f"seed {request.seed}, {request.dtype}"
    if request.images is not None:
        images = f"{sum(len(one.files) for one in drawn)} images of {request.images}"
    settings = {name: config.model_dump(mode="json") for name, (_, config) in job.scorers.items()}
    prompts = f"{len(drawn)} of {len(job.prompts)}"
    return SuiteSetup(job.suite.name, prompts, images, settings)


def _open(policy: Policy | None, request: Request, model: str, ranks: World) -> Path:
    """The folder of the evaluation; one of other images is an `InputError`."""
    about = {"images": str(request.images and request.images.resolve())}
    if policy is not None:
        about = {
            "model": model,
            "weights": base_digest(policy.module),
            "guidance_scale": request.scale,
            "seed": request.seed,
            "dtype": request.dtype,
            "smoke": request.smoke,
        }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^A-Za-z0-9.@]+", "-", model).strip("-.")[-60:]
    out = request.out or Path("evaluations") / f"{slug or 'images'}-{digest}"
    ranks.broadcast_object(lambda: _claim(out, about))
    return out


def _claim(out: Path, about: Mapping[str, Any]) -> None:
    file = out / "setup.json"
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        others = [key for key in {**kept, **about} if kept.get(key) != about.get(key)]
        if others:
            raise InputError(
                f"{out}: was made with another {', '.join(others)}; name another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is no folder of an evaluation and not empty; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(about, indent=1) + "\n")


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Draws the images of a prompt set that are not there yet.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


IMAGES_AT_ONCE = 64
"""Images after which files are written and a stop is heard."""


@dataclass(frozen=True)
class Painter:
    """Draws images of one model by one way of sampling; equal painters draw equal images."""

    engine: Engine
    sampling: Sampling
    seed: int

    def draw_missing(
        self,
        folder: ImageFolder,
        prompts: Sequence[tuple[int, Prompt]],
        num_images: int,
        *,
        advance: Callable[[int], None] = lambda _: None,
        signals: Sequence[int] = (),
    ) -> None:
        """Draws what the folder lacks of these prompts (by place in their set), `num_images` each.

        Image k of a prompt has the same stream whatever else is drawn. Raises `Stopped` when
        `signals` fills; what is drawn by then is there.
        """
        lacking = [(p, prompt) for p, prompt in prompts if folder.missing(p, num_images)]
        advance(num_images * (len(prompts) - len(lacking)))
        at_once = max(1, IMAGES_AT_ONCE // num_images)
        for first in range(0, len(lacking), at_once):
            if signals:
                raise Stopped(
                    f"{folder.root}: stopped; run the same command again to go on",
                    signal_number=signals[0],
                )
            self._draw(folder, lacking[first : first + at_once], num_images)
            advance(num_images * len(lacking[first : first + at_once]))

    def _draw(
        self, folder: ImageFolder, some: Sequence[tuple[int, Prompt]], num_images: int
    ) -> None:
        drawn = rollout(
            self.engine,
            [prompt for _, prompt in some],
            group_size=num_images,
            sampling=self.sampling,
            seed=self.seed,
            step=0,
        )
        for row, (place, prompt) in enumerate(some):
            folder.begin(place, prompt)
            for image in folder.missing(place, num_images):
                folder.write(place, image, drawn.images_NHWC[row * num_images + image])


# Scores images with one reward, prompt by prompt, into files that a later call takes up.
#
# Shape suffixes: N images, H x W pixels, C colour channels.


IMAGES_PER_CALL = 64
"""Images that a reward gets in one call, where a prompt has fewer."""


@dataclass(frozen=True)
class ScoreFolder:
    """The scores of one reward on one prompt set: a file per prompt."""

    root: Path
    config: RewardConfig

    @property
    def path(self) -> Path:
        """NAME-HASH8, so that other settings of the reward have other scores."""
        settings = self.config.model_dump(mode="json", exclude={"name", "weight", "self_test"})
        return self.root / f"{self.config.name}-{_hash8(settings)}"

    def read(self, drawn: DrawnPrompt) -> list[Score] | None:
        """The scores of a prompt's images; None where they are not those of these files."""
        file = self._file(drawn)
        if not file.exists():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["made_of"] != _made_of(drawn):
            return None
        return [Score(**score) for score in record["scores"]]

    def write(self, drawn: DrawnPrompt, scores: Sequence[Score]) -> None:
        """Keeps the scores of a prompt's images."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"made_of": _made_of(drawn), "scores": [asdict(score) for score in scores]}
        replace_text(self._file(drawn), json.dumps(record, allow_nan=False) + "\n")

    def _file(self, drawn: DrawnPrompt) -> Path:
        return self.path / f"{drawn.place:05d}.json"


def score_missing(
    folder: ScoreFolder,
    prompts: Sequence[DrawnPrompt],
    *,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    signals: Sequence[int] = (),
) -> None:
    """Scores the prompts that have no scores yet; the reward is built where there are any.

    A reward that fails twice on the same images is a `RewardError`; a failure is no score. Raises
    `Stopped` when `signals` fills.
    """
    lacking = [drawn for drawn in prompts if folder.read(drawn) is None]
    advance(sum(len(one.files) for one in prompts) - sum(len(one.files) for one in lacking))
    if not lacking:
        return
    reward = folder.config.build(device)
    for some in _batches(lacking):
        if signals:
            raise Stopped(
                f"{folder.path}: stopped; run the same command again to go on",
                signal_number=signals[0],
            )
        for drawn, scores in zip(some, _scores(folder.config.name, reward, some), strict=True):
            folder.write(drawn, scores)
            advance(len(scores))


def _batches(prompts: Sequence[DrawnPrompt]) -> Iterator[list[DrawnPrompt]]:
    batch: list[DrawnPrompt] = []
    for drawn in prompts:
        if batch and sum(len(one.files) for one in (*batch, drawn)) > IMAGES_PER_CALL:
            yield batch
            batch = []
        batch.append(drawn)
    if batch:
        yield batch


def _scores(name: str, reward: Reward, some: Sequence[DrawnPrompt]) -> list[list[Score]]:
    """The scores of each prompt's images; images of other sizes go in calls of their own."""
    images = [read_images(drawn.files) for drawn in some]
    scores: list[list[Score]] = [[] for _ in some]
    sizes = [{tuple(image.shape) for image in group} for group in images]
    for n, drawn in enumerate(some):
        if len(sizes[n]) != 1:
            raise RewardError(f"{drawn.files[0].parent}: images of several sizes; make them one")
    for size in dict.fromkeys(next(iter(one)) for one in sizes):
        places = [n for n, one in enumerate(sizes) if size in one]
        images_NHWC = torch.stack([image for n in places for image in images[n]])
        prompts = [some[n].prompt for n in places for _ in some[n].files]
        given = iter(_twice(name, reward, images_NHWC, prompts))
        for n in places:
            scores[n] = [next(given) for _ in some[n].files]
    return scores


def _twice(name: str, reward: Reward, images_NHWC: torch.Tensor, prompts: list[Any]) -> list[Score]:
    """The scores of one call, asked for again once; a RewardError where that fails too."""
    failures = []
    for _ in range(2):
        try:
            scores = reward(images_NHWC, prompts)
        except StageError:
            raise  # the user's input is wrong: trying again does not mend it
        except Exception as error:  # a reward is the user's code and may raise anything
            failures.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        check_scores(name, scores, len(prompts))
        bad = [one.value for one in scores if one.value is not None and not _finite(one.value)]
        if not bad:
            return list(scores)
        failures.append(f"gave {bad[0]}")
    raise RewardError(
        f"reward '{name}' failed twice on '{prompts[0].text[:40]}' and what follows ("
        f"{failures[-1]}); put it right and run the same command again"
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _made_of(drawn: DrawnPrompt) -> dict[str, Any]:
    """What a prompt's scores depend on besides the reward: prompt, metadata, image files."""
    stamps = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in _stats(drawn)]
    metadata = json.dumps(dict(drawn.prompt.metadata), sort_keys=True, default=str)
    return {"prompt": drawn.prompt.text, "hash": _hash8([metadata, stamps])}


def _stats(drawn: DrawnPrompt) -> Iterator[tuple[Path, Any]]:
    for file in drawn.files:
        yield file, file.stat()


def _hash8(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
