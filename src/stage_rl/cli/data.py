"""`stage data`: prompt sets as files, and whether two of them overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stage_rl.cli.options import refuse_taken, writing
from stage_rl.errors import InputError, StageError
from stage_rl.settings import BUILT_IN

if TYPE_CHECKING:
    from stage_rl.types import Prompt

app = typer.Typer(help="Build and check prompt sets.", no_args_is_help=True)


@app.command("geneval")
def geneval(
    out: Annotated[Path, typer.Option(help="JSON lines of GenEval metadata to write.")],
    mix: Annotated[
        Literal["stage", "flow_grpo"], typer.Option(help="Ratio of the tasks.")
    ] = "stage",
    num_prompts: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, show_default="50000")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    evaluation: Annotated[
        bool, typer.Option("--evaluation", help="Write the 553 evaluation prompts instead.")
    ] = False,
) -> None:
    """Write a GenEval training set without any evaluation prompt, as a file to look at or share."""
    from stage_rl.prompts.geneval import GenEvalPromptsConfig, geneval_prompts

    refuse_taken("--out", out)
    if evaluation and num_prompts:
        raise InputError("--num-prompts: the evaluation prompts are 553; leave it out")
    if evaluation:
        records = geneval_prompts()
    else:
        config = GenEvalPromptsConfig(mix=mix, num_prompts=num_prompts or 50_000, seed=seed)
        records = [dict(prompt.metadata) for prompt in config.build()]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with writing("--out", out):
        out.write_text("".join(lines), encoding="utf-8")
    distinct = len({record["prompt"] for record in records})
    typer.echo(f"{out}: {len(records)} prompts, {distinct} of them distinct")


@app.command("questions")
def questions(
    name: Annotated[str, typer.Argument(help="Such as geneval2, dpg, wise, tiif.")],
    clone: Annotated[
        Path, typer.Option("--from", help="Clone of the repository that publishes it.")
    ],
    out: Annotated[Path, typer.Option(help="Question file to write; .gz compresses it.")],
) -> None:
    """Write a benchmark's prompts and questions, from its published files, for `stage eval`."""
    refuse_taken("--out", out)
    from stage_rl.prompts.question_sources import convert_questions
    from stage_rl.prompts.questions import write_questions

    header, records = convert_questions(name, clone)
    with writing("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_questions(out, header, records)
    number = sum(len(record.questions) for record in records)
    typer.echo(f"{out}: {len(records)} prompts, {number} questions; licence: {header.licence}")


@app.command("check")
def check(
    train: Annotated[str, typer.Argument(help="FILE, KIND:FILE, or geneval.")],
    evaluation: Annotated[str, typer.Argument(help="The same.")],
) -> None:
    """Check that no evaluation prompt is in a training set; exits with 1 where one is.

    KIND is a prompts kind of recipes, such as t2i_r1 or ocr; geneval alone is the 553 evaluation
    prompts.
    """
    from stage_rl.prompts.leakage import find_leaks, sentence

    training, held_out = _prompts(train), _prompts(evaluation)
    found = sentence(find_leaks(training, held_out), len(held_out))
    if found:
        raise StageError(f"{train}: {found}; remove them")
    typer.echo(f"none of the {len(held_out)} evaluation prompts is among {len(training)} prompts")


def _prompts(source: str) -> tuple[Prompt, ...]:
    from pydantic import ValidationError

    from stage_rl.config import explain
    from stage_rl.prompts.files import PromptsConfig, as_prompts
    from stage_rl.prompts.geneval import geneval_prompts

    if source == "geneval":
        return as_prompts(geneval_prompts())
    kind, colon, path = source.partition(":")
    if not colon or kind not in BUILT_IN["prompts"]:
        kind, path = "file", source
    try:
        return PromptsConfig.model_validate({"kind": kind, "path": path}).build()
    except ValidationError as error:
        raise InputError(f"{source}: {explain(error)}") from error
