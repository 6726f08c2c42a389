"""`stage eval`: a benchmark's table for one model, or two on the same random streams."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stage_rl.cli.options import check_writable, finite, write_json
from stage_rl.errors import InputError
from stage_rl.settings import near_or_all

if TYPE_CHECKING:
    from stage_rl.evaluation.results import Comparison, Results
    from stage_rl.evaluation.run import Request

    Outcome = Results | Comparison

SHAPES = "shapes-geneval"
PUBLISHED = ("geneval", "t2i-compbench", "hps", "drawbench", "ocr", "diversity")
NAMES = f"{', '.join(PUBLISHED)}, all, or {SHAPES}"


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder, hub id, run, RUN@STEP, RUN@best; or `shapes`.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of a benchmark's rewards; REWARD=null leaves one out.",
            metavar="[REWARD.KEY=VALUE]...",
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help=f"Once or more: {NAMES}.", show_default=SHAPES)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Score images made elsewhere, in place of a model.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="STAGE_PROMPT_DATA", help="Folder of the published prompt sets, or one set."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of images and scores; what is there is kept.")
    ] = None,
    images_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Default: the benchmark's own.")
    ] = None,
    images_per_task: Annotated[
        int | None, typer.Option(min=1, help=f"For {SHAPES}.", show_default="400")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Default: the benchmark's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random streams.")] = 0,
    dtype: Annotated[
        Literal["float32", "mixed"],
        typer.Option(help="Precision of the sampler; mixed: bf16 linear layers."),
    ] = "mixed",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="A base to compare with, on the same random streams.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few prompts and tiny random rewards: seconds.")
    ] = False,
) -> None:
    """Score a model, or images made elsewhere, on benchmarks."""
    from stage_rl.evaluation.run import Request
    from stage_rl.evaluation.suites import parse_overrides

    check_writable(json_file)
    if images is not None and model is not None:
        # Without a model the first setting stands in its place.
        model, settings = None, [model, *(settings or ())]
    if smoke and images is None:
        model = model or "shapes"
    names = _names(benchmark or [SHAPES], model, images=images, against=against)
    request = Request(
        out=out,
        data=data,
        images=images,
        images_per_prompt=images_per_prompt,
        guidance_scale=guidance_scale,
        seed=seed,
        dtype=dtype,
        smoke=smoke,
        scorers=parse_overrides(settings or ()),
    )
    published = [name for name in names if name != SHAPES]
    given = {
        "settings": settings,
        "--out": out,
        "--images-per-prompt": images_per_prompt,
    }
    _refuse(given if not published else {}, SHAPES)
    with_shapes = published != names or (smoke and "all" in names and images is None)
    _refuse({"--images-per-task": images_per_task} if not with_shapes else {}, ", ".join(names))
    outcomes: dict[str, Outcome] = {}
    if with_shapes:
        num_images = 2 if smoke else images_per_task or 400
        outcomes[SHAPES] = _shapes(str(model), against, request, num_images)
    if published:
        outcomes |= _published(model, against, published, request)
    figures = {name: outcome.to_json() for name, outcome in outcomes.items()}
    write_json(json_file, figures if len(figures) > 1 else next(iter(figures.values())))


def _refuse(given: Mapping[str, object], name: str) -> None:
    """An InputError for the first option that a benchmark would drop."""
    for option, value in given.items():
        if value:
            raise InputError(f"{option}: {name} does not take it; leave it out")


def _names(
    names: Sequence[str], model: str | None, *, images: Path | None, against: str | None
) -> list[str]:
    """The benchmarks; an InputError where there is nothing to score, or images that do not fit."""
    if model is None and images is None:
        raise InputError("MODEL: is missing; write one, or --images FOLDER")
    for name in names:
        if name not in (SHAPES, "all", *PUBLISHED):
            known = near_or_all(name, (SHAPES, "all", *PUBLISHED))
            raise InputError(f"--benchmark: unknown '{name}'; {known}")
    if images is not None and SHAPES in names:
        raise InputError(f"--images: {SHAPES} draws its own; write another --benchmark: {NAMES}")
    if images is not None and against is not None:
        raise InputError(
            "--against: compares models on the same random streams; leave out --images"
        )
    return list(names)


def _shapes(model: str, against: str | None, request: Request, images_per_task: int) -> Outcome:
    from stage_rl.evaluation import run as runner

    score = (
        functools.partial(runner.evaluate, model)
        if against is None
        else functools.partial(runner.evaluate_against, model, against)
    )
    outcome = score(
        SHAPES,
        images_per_task=images_per_task,
        guidance_scale=request.guidance_scale,
        seed=request.seed,
        dtype=request.dtype,
    )
    typer.echo(outcome.table())
    return outcome


def _published(
    model: str | None, against: str | None, names: Sequence[str], request: Request
) -> dict[str, Outcome]:
    from stage_rl.distributed import launched
    from stage_rl.evaluation import run as runner

    outcomes: Sequence[Outcome]
    if against is not None and model is not None:
        outcomes = runner.compare_suites(model, against, names, request)
    else:
        outcomes = runner.evaluate_suites(model, names, request)
    if launched().first:
        for outcome in outcomes:
            typer.echo(f"{outcome.table()}\n")
        for line in runner.skipped(names, request):
            typer.echo(line)
    return {outcome.benchmark: outcome for outcome in outcomes}
