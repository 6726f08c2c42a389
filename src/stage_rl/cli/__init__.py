"""The command `stage`: one small module per verb.

Verbs import what they run inside their functions, so that help and a wrong recipe are answered
without loading torch.
"""

from __future__ import annotations

import os
import sys

import typer

from stage_rl.cli import bench, data, evaluate, export, recipes, rewards, sample, shapes, train
from stage_rl.errors import StageError, Stopped

app = typer.Typer(
    name="stage",
    help="Trains autoregressive text-to-image models with STAGE (arXiv 2509.25027).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(rewards.app, name="rewards")
app.add_typer(bench.app, name="bench")
app.add_typer(shapes.app, name="shapes")


def main() -> None:
    """Runs the command line; exit codes: 0 done, 1 failed, 2 wrong input, 130 / 143 stopped."""
    # A recipe may name a module:Class that lies in the working directory.
    sys.path.append(os.getcwd())
    try:
        app()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        sys.exit(130)
