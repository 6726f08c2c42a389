"""`stage figure`: the figures of the paper, drawn from runs, studies and models."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from stage_rl.cli.options import finite, free_name, refuse_taken, writing
from stage_rl.errors import InputError

app = typer.Typer(
    help="Draw the figures of the paper, with the data of each beside it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MODEL = "Folder, hub id, run, RUN@STEP, RUN@best; or `shapes`."
Out = Annotated[
    Path | None,
    typer.Option(
        help="FILE.png, or FILE.pdf for both; the data lie beside it.",
        show_default="NAME.png, or the next that is free",
    ),
]
Inputs = Annotated[
    list[Path], typer.Argument(help="Folders of runs and of studies.", metavar="RUN...")
]
Cell = Annotated[str | None, typer.Option(help="Only this cell of a study.")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only these arms, in this order.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Other names, one for each, in their order.")
]
Window = Annotated[
    int, typer.Option(min=1, help="Steps of the running mean of what every step measures.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Once or more.", show_default="held-out ones of the first run"),
]
Images = Annotated[int, typer.Option(min=1, help="Of each prompt and model.")]
Guidance = Annotated[
    float | None,
    typer.Option(min=0, callback=finite, show_default="that of the run, model or benchmark"),
]
Temperature = Annotated[
    float, typer.Option(min=0, callback=finite, help="0 draws the likeliest token.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random streams.")]


@app.command()
def curves(
    inputs: Inputs,
    out: Out = None,
    cell: Cell = None,
    arms: Arms = None,
    labels: Labels = None,
    window: Window = 10,
) -> None:
    """Entropy, entropy drift and KL of runs against the step (paper: 3, 15 to 17)."""
    _write(out, "curves", inputs, cell=cell, arms=arms, labels=labels, window=window)


@app.command()
def scores(
    inputs: Inputs,
    out: Out = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Once or more: a name of metrics.jsonl."),
    ] = None,
    cell: Cell = None,
    arms: Arms = None,
    labels: Labels = None,
    window: Window = 10,
) -> None:
    """Reward and held-out scores of runs against the step (paper: 5, 8, 12, 18)."""
    chosen = {"cell": cell, "arms": arms, "labels": labels}
    _write(out, "scores", inputs, metrics=metrics, window=window, **chosen)


@app.command()
def frontier(
    inputs: Inputs,
    out: Out = None,
    score: Annotated[str, typer.Option(help="A score of the evaluations.")] = "validation/gold",
    cell: Cell = None,
    arms: Arms = None,
    labels: Labels = None,
) -> None:
    """A held-out score against the root of the exact KL, by arm and seed."""
    _write(out, "frontier", inputs, score=score, cell=cell, arms=arms, labels=labels)


@app.command()
def similarity(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Out = None,
    step: Annotated[
        int | None, typer.Option(help="A step of samples/.", show_default="the last")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Of its groups.", show_default="the most different rewards")
    ] = None,
) -> None:
    """Where images of a group are alike: maps of pairs and of the group (paper: 1c)."""
    _write(out, "similarity", run, step=step, group=group)


@app.command()
def temperature(
    model: Annotated[str, typer.Argument(help=MODEL)],
    out: Out = None,
    temperatures: Annotated[
        str, typer.Option(help="Parted by commas.")
    ] = "0.25,0.5,0.75,1,1.25,1.5",
    benchmark: Annotated[str, typer.Option(help="As for stage eval.")] = "shapes-geneval",
    data: Annotated[
        Path | None, typer.Option(envvar="STAGE_PROMPT_DATA", help="As for stage eval.")
    ] = None,
    images_per_prompt: Annotated[int | None, typer.Option(min=1)] = None,
    images_per_task: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
) -> None:
    """Images, entropy and score against the temperature (paper: 2, 13, 14)."""
    _write(
        out,
        "temperature",
        model,
        benchmark=benchmark,
        temperatures=_numbers(temperatures),
        data=data,
        images_per_prompt=images_per_prompt,
        images_per_task=images_per_task,
        guidance_scale=guidance_scale,
        seed=seed,
    )


@app.command()
def diversity(
    models: Annotated[list[str], typer.Argument(help=MODEL, metavar="MODEL...")],
    out: Out = None,
    prompts: Prompts = None,
    images: Images = 6,
    guidance_scale: Guidance = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    labels: Labels = None,
) -> None:
    """Models side by side on the same prompts and random streams (paper: 9, 19)."""
    drawn = {"guidance_scale": guidance_scale, "temperature": temperature, "seed": seed}
    _write(out, "diversity", models, labels=labels, prompts=prompts, num_images=images, **drawn)


@app.command("before-after")
def before_after(
    run: Annotated[str, typer.Argument(help="A run, RUN@STEP or RUN@best.")],
    out: Out = None,
    prompts: Prompts = None,
    images: Images = 4,
    guidance_scale: Guidance = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
) -> None:
    """A run beside its base on the same prompts and random streams (paper: 6, 20 to 22)."""
    drawn = {"guidance_scale": guidance_scale, "temperature": temperature, "seed": seed}
    _write(out, "before-after", run, prompts=prompts, num_images=images, **drawn)


DATA = (".csv", ".json")
"""How the file ends that holds what a figure draws."""


def _write(out: Path | None, name: str, inputs: Any, **options: Any) -> None:
    """Draws and writes a figure; options that are None have the function's own defaults."""
    out = out or free_name(Path(f"{name}.png"), *DATA)
    if out.suffix.lower() not in (".png", ".pdf") or not out.parent.is_dir():
        raise InputError(f"--out {out}: no place for a figure; write FILE.png or FILE.pdf")
    refuse_taken("--out", out, ".png", *DATA)
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "stage figure: matplotlib is not installed; run pip install 'stage-rl[figures]'"
        )
    from stage_rl.report.figures import paper_style

    module = "curves" if name in ("curves", "scores", "frontier") else "images"
    draw = getattr(importlib.import_module(f"stage_rl.report.{module}"), name.replace("-", "_"))
    with paper_style():
        drawing = draw(inputs, **{k: v for k, v in options.items() if v is not None})
        with writing("--out", out):
            files = drawing.write(out)
    for file in files:
        typer.echo(file)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(0 <= number < math.inf for number in numbers):
        raise InputError(f"--temperatures: '{text}' will not do; write numbers such as 0.5,1,1.5")
    return numbers
