"""`stage train`: trains a recipe, or goes on with its run, and compares what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from stage_rl.cli.options import Overrides, complete_recipe
from stage_rl.cli.report import at_end_of
from stage_rl.console import say_aside
from stage_rl.recipes import find_recipe

if TYPE_CHECKING:
    from stage_rl.recipe import Recipe


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a built-in recipe, a YAML file, or a run to go on with.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe and the memory it needs; stop."),
    ] = False,
) -> None:
    """Train a recipe; the same command again goes on where the run stopped, and so does the name of
    the run, with other settings of memory, logging, saving, device or evaluation.
    """
    find_recipe(recipe)  # a wrong name is answered without loading torch
    from stage_rl import api, config
    from stage_rl.distributed import launched
    from stage_rl.training.memory import check_memory, gpu_memory_gb, plan_of, report
    from stage_rl.training.run import check_run

    settings = config.load_recipe(recipe, overrides or ())
    started = launched()
    for note in settings.notes if started.rank == 0 else ():
        say_aside(note)
    if dry_run:
        check_run(settings)
        if started.rank == 0:
            typer.echo(f"# Run folder: {config.run_folder(settings)}")
            typer.echo(config.describe(settings), nl=False)
            memory_gb = gpu_memory_gb(settings) if plan_of(settings) else None
            for line in report(settings, memory_gb, num_processes=started.size):
                typer.echo(f"# {line}")
            check_memory(settings, memory_gb, num_processes=started.size)
        return
    if started.rank == 0:
        _say_leaks(settings)
    folder = api.train(settings)
    if started.rank:
        return
    if settings.evaluation is not None and settings.evaluation.images_per_task:
        typer.echo(api.evaluate_run(settings, folder))
    typer.echo(f"run: {folder}")
    # A run without images, one of a study say, is seldom looked at alone.
    if settings.run.log_images_every:
        typer.echo(at_end_of(folder))


def _say_leaks(settings: Recipe) -> None:
    """Says on stderr which prompts of the evaluation are training prompts too."""
    if settings.evaluation is None:
        return
    from stage_rl.evaluation.suites import find_suite
    from stage_rl.prompts.leakage import find_leaks, sentence

    evaluation = settings.evaluation
    held_out = find_suite(evaluation.benchmark).prompt_set.prompts(evaluation.data_folder)
    found = sentence(find_leaks(settings.prompts.build(), held_out), len(held_out))
    if found:
        say_aside(f"{settings.evaluation.benchmark}: {found}")
