"""Runs published benchmarks: draws every image once, lets every reward score it, and reports.

Files go to one folder, and what is there is not made again:
OUT/setup.json, OUT/images/SET/NNNNN/..., OUT/scores/SET/SCORER-HASH8/NNNNN.json, OUT/NAME.json.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from stage_rl.errors import InputError
from stage_rl.evaluation import published
from stage_rl.evaluation.benchmark import Results, SuiteSetup
from stage_rl.evaluation.elsewhere import find_images
from stage_rl.evaluation.generate import Painter
from stage_rl.evaluation.images import DrawnPrompt, ImageFolder
from stage_rl.evaluation.progress import progress
from stage_rl.evaluation.prompt_sets import WHERE, is_there, prompts_of
from stage_rl.evaluation.results import ImageScore
from stage_rl.evaluation.scorers import Overrides, check_names, scorers_of
from stage_rl.evaluation.scoring import ScoreFolder, score_missing
from stage_rl.evaluation.smoke import IMAGES_PER_PROMPT
from stage_rl.evaluation.suites import Scorer, Suite, chosen, more_figures
from stage_rl.policies.base import Policy
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sampling import Sampling
from stage_rl.schema import RewardConfig
from stage_rl.training.contents import base_digest
from stage_rl.training.distributed import ALONE, Ranks
from stage_rl.training.runs import replace_text
from stage_rl.training.signals import stop_signals
from stage_rl.types import Prompt

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
    ranks: Ranks = ALONE,
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
            objection = config.objection(prompt) if scorer.asks(prompt) else None
            if objection:
                raise InputError(
                    f"{suite.name}: {name} {objection} ('{prompt.text[:40]}'); leave it out: "
                    f"{name}=null"
                )
    return _Job(suite, prompts, request.images_per_prompt or own, scorers)


@dataclass(frozen=True)
class _Run:
    """One call: what images are drawn with, and where files go."""

    policy: Policy | None
    request: Request
    model: str
    out: Path
    ranks: Ranks
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
            setup=_setup(job, drawn, self.request),
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


def _setup(job: _Job, drawn: Sequence[DrawnPrompt], request: Request) -> SuiteSetup:
    images = f"{job.num_images} of each, guidance {request.scale:g}, "
    images += f"seed {request.seed}, {request.dtype}"
    if request.images is not None:
        images = f"{sum(len(one.files) for one in drawn)} images of {request.images}"
    settings = {name: config.model_dump(mode="json") for name, (_, config) in job.scorers.items()}
    prompts = f"{len(drawn)} of {len(job.prompts)}"
    return SuiteSetup(job.suite.name, prompts, images, settings)


def _open(policy: Policy | None, request: Request, model: str, ranks: Ranks) -> Path:
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
    ranks.from_first(lambda: _claim(out, about))
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
