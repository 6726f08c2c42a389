"""`stage eval`: a benchmark's table for one model, or two on the same random streams."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

import typer

from stage_rl.cli.options import check_writable, finite, write_json


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder, hub id, run, RUN@STEP, RUN@best; or `shapes`.")
    ],
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark.")] = "shapes-geneval",
    images_per_task: Annotated[int, typer.Option(min=1)] = 400,
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
) -> None:
    """Score a model on a benchmark."""
    from stage_rl.evaluation import runner

    check_writable(json_file)
    score = (
        functools.partial(runner.evaluate, model)
        if against is None
        else functools.partial(runner.evaluate_against, model, against)
    )
    outcome = score(
        benchmark,
        images_per_task=images_per_task,
        guidance_scale=guidance_scale,
        seed=seed,
        dtype=dtype,
    )
    typer.echo(outcome.table())
    write_json(json_file, outcome.to_json())
