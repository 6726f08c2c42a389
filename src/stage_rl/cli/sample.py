"""`stage sample`: images of prompts, as one PNG grid with a row per prompt or as single files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stage_rl.cli.options import finite, free_name, refuse_taken, writing
from stage_rl.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from stage_rl.types import Prompt


def sample(
    model: Annotated[
        str, typer.Argument(help="Folder, hub id, run, RUN@STEP, RUN@best; or `shapes`.")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One row of the grid each.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="FILE: .txt with a prompt a line, .jsonl, .json or .csv."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="Default: the model family's own.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="0 draws the likeliest token.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0: from all tokens. Default: the family's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="the GPU where there is one")
    ] = None,
    dtype: Annotated[
        Literal["mixed", "float32"] | None,
        typer.Option(
            help="mixed: bf16 linear layers.", show_default="mixed on a GPU, else float32"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="FILE.png for a grid, or a folder for single images PROMPT-IMAGE.",
            show_default="samples.png, or the next that is free",
        ),
    ] = None,
) -> None:
    """Draw prompts with a model."""
    out = _place(out)
    from stage_rl import api
    from stage_rl.console import progress
    from stage_rl.pictures import image_grid

    asked = _prompts(prompts or [], prompt_file)
    with progress("draw", len(asked) * images) as advance:
        rollout = api.sample(
            model,
            asked,
            images_per_prompt=images,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            device=device,
            dtype=dtype,
            advance=advance,
        )
    drawn_NHWC = rollout.images_NHWC.numpy()
    with writing("--out", out):
        if out.suffix:
            image_grid(drawn_NHWC, columns=images).save(out)
        else:
            _write_each(out, drawn_NHWC, images)
    typer.echo(str(out))


def _place(out: Path | None) -> Path:
    """A file that is not there yet, or a folder without files, where something can be written."""
    out = free_name(Path("samples.png")) if out is None else out
    is_grid = out.suffix.lower() == ".png"
    if not out.parent.is_dir() or (not is_grid and (out.suffix or out.is_file())):
        raise InputError(f"--out {out}: no place for images; write FILE.png or a folder")
    refuse_taken("--out", out)
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out {out}: holds files already; name another folder")
    if not os.access(out if out.is_dir() else out.parent, os.W_OK):
        raise InputError(f"--out {out}: no file can be written there; name another")
    return out


def _prompts(texts: list[str], file: Path | None) -> list[Prompt]:
    """Those of the command line, then those of the file."""
    from stage_rl.prompts.files import read_prompts
    from stage_rl.types import Prompt

    placed = [("", text) for text in texts]
    if file:
        placed += [(where, text) for where, text, _ in read_prompts(file)]
    listed = [Prompt(text, i, source=where) for i, (where, text) in enumerate(placed)]
    if not listed:
        raise InputError("PROMPTS: are missing; write some, or --prompts FILE")
    return listed


def _write_each(folder: Path, images_NHWC: np.ndarray, images_per_prompt: int) -> None:
    """Writes FOLDER/PROMPT-IMAGE.png, both counted from 0."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number, image_HWC in enumerate(images_NHWC):
        prompt, image = divmod(number, images_per_prompt)
        Image.fromarray(image_HWC).save(folder / f"{prompt:05d}-{image:02d}.png")
