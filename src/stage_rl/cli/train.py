"""`stage train`: trains a recipe, or goes on with its run."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a built-in recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as dotted.key=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")
    ] = False,
) -> None:
    """Train a recipe; the same command again goes on where the run stopped."""
    from stage_rl import config

    settings = config.load_recipe(recipe, overrides or ())
    if dry_run:
        typer.echo(f"# Run folder: {config.run_folder(settings)}")
        typer.echo(config.describe(settings), nl=False)
        return
    from stage_rl.training.loop import train as run

    typer.echo(f"run: {run(settings)}")
