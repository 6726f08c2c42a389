"""`stage eval`: a benchmark's table for one model, or two on the same random streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stage_rl.cli.options import JsonFile, finite, write_json
from stage_rl.errors import InputError
from stage_rl.settings import BUILT_IN

if TYPE_CHECKING:
    from stage_rl.evaluation.results import Comparison, Results
    from stage_rl.evaluation.suites import Overrides
    from stage_rl.evaluation.understanding import UnderstandingReport

SHAPES = "shapes-geneval"
LIST = "list"
UNDERSTANDING = ("pope", "mmbench")
NAMES = f"{', '.join(name for name in BUILT_IN['benchmark'] if name != SHAPES)}, all, or {SHAPES}"


DRAWING = (
    *("images_per_prompt", "images_per_task", "guidance_scale", "temperature"),
    *("top_k", "seed", "dtype"),
)
"""The options of how images are drawn."""


def evaluate(
    context: typer.Context,
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
        list[str] | None,
        typer.Option(
            help=f"Once or more: {NAMES}; or module:NAME. pope, mmbench: questions about images. "
            "list: what each needs.",
            show_default=SHAPES,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Score external images, in place of a model.")
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
        int | None, typer.Option(min=1, max=10_000, help="Default: the benchmark's own.")
    ] = None,
    images_per_task: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            help="Spread evenly over a task's prompts.",
            show_default=f"400 for {SHAPES}",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0, callback=finite, help="Default: the benchmark's own, else the model family's."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="0 draws the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0: from all tokens. Default: the family's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random streams.")] = 0,
    dtype: Annotated[
        Literal["float32", "mixed"],
        typer.Option(help="Precision of the sampler; mixed: bf16 linear layers."),
    ] = "mixed",
    json_file: JsonFile = None,
    against: Annotated[
        str | None, typer.Option(help="A base to compare with, on the same random streams.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few prompts and made-up scores: seconds.")
    ] = False,
) -> None:
    """Score a model, or external images, on benchmarks."""
    # torch is loaded for a run alone, not for --help.
    from stage_rl import api
    from stage_rl.distributed import environment, launched
    from stage_rl.evaluation.request import Request
    from stage_rl.evaluation.run import skipped
    from stage_rl.evaluation.suites import parse_overrides

    if images is not None and model is not None:
        # Without a model the first setting stands in its place.
        model, settings = None, [model, *(settings or ())]
    if benchmark == [LIST]:
        if model is not None and "=" in model:
            settings = [model, *(settings or ())]
        _list(data, parse_overrides(settings or ()))
        return
    asked = [name for name in benchmark or () if name in UNDERSTANDING]
    if asked:
        _check_questions(asked, benchmark or (), model, smoke=smoke)
    if smoke and images is None:
        model = model or "shapes"
    names = benchmark or [SHAPES]
    if smoke and "all" in names and images is None:
        names = [SHAPES, *names]
    _check(names, model, images=images, against=against)
    _check_drawing(context, names)
    request = Request(
        out=out,
        data=data,
        images=images,
        images_per_prompt=images_per_prompt,
        images_per_task=images_per_task,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        dtype=dtype,
        smoke=smoke,
        scorers=parse_overrides(settings or ()),
    )
    outcomes: Sequence[Results | Comparison | UnderstandingReport]
    if asked and model is not None:
        outcomes = [
            api.evaluate_understanding(model, name, request, against=against) for name in asked
        ]
    elif against is not None and model is not None:
        outcomes = api.evaluate_against(model, against, names, request)
    else:
        outcomes = api.evaluate_all(model, names, request)
    if not launched().first:
        return
    for outcome in outcomes:
        typer.echo(f"{outcome.table()}\n")
    for line in () if asked else skipped(names, request):
        typer.echo(line)
    made_with = {"environment": environment(launched().size)}
    figures = {outcome.benchmark: outcome.to_json() | made_with for outcome in outcomes}
    write_json(json_file, figures if len(figures) > 1 else next(iter(figures.values())))


def _list(data: Path | None, overrides: Overrides) -> None:
    from stage_rl.evaluation.needs import needs_table
    from stage_rl.evaluation.suites import find_suites

    typer.echo(needs_table(find_suites([SHAPES, "all"]), data, overrides))


def _check(
    names: Sequence[str], model: str | None, *, images: Path | None, against: str | None
) -> None:
    """Raises InputError where there is nothing to score, or images that do not fit."""
    if model is None and images is None:
        raise InputError("MODEL: is missing; write one, or --images FOLDER")
    if images is not None and SHAPES in names:
        raise InputError(f"--images: {SHAPES} draws its own; write another --benchmark: {NAMES}")
    if images is not None and against is not None:
        raise InputError(
            "--against: compares models on the same random streams; leave out --images"
        )


def _check_questions(
    asked: Sequence[str], benchmark: Sequence[str], model: str | None, *, smoke: bool
) -> None:
    """Raises InputError where questions about images are asked of none, or beside drawing."""
    if model is None or len(asked) < len(benchmark):
        raise InputError(f"--benchmark {asked[0]}: takes a MODEL, and no others beside it")
    if smoke:
        raise InputError(f"--smoke: {asked[0]} asks about pictures of its own; leave it out")


def _check_drawing(context: typer.Context, names: Sequence[str]) -> None:
    """Raises InputError for an option of drawing that the images or benchmarks do not take."""
    options = context.params
    given = [name for name in DRAWING if _is_given(context, name)]
    if options["images"] is not None and given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option}: with --images nothing is drawn; leave it out")
    per_task, per_prompt = options["images_per_task"], options["images_per_prompt"]
    if per_task and per_prompt and SHAPES not in names:
        raise InputError("--images-per-task: --images-per-prompt is given too; leave one out")
    if per_prompt and list(names) == [SHAPES]:
        raise InputError(f"--images-per-prompt: {SHAPES} does not take it; leave it out")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was written, be it with the value that it has without."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
