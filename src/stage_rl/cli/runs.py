"""`stage runs`, `stage compare` and `stage watch`: what run folders say, from small files alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from stage_rl.console import aligned, live_view
from stage_rl.errors import InputError
from stage_rl.report.runs import Run, find_runs, read_run

POLL_S = 1.0

Folder = Annotated[Path, typer.Argument(help="A run folder.")]


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, folders below included.")] = Path(
        "runs"
    ),
) -> None:
    """List runs, the latest first; reward and KL are means of the last 10 steps."""
    rows, tails = [["run", "steps", "reward", "kl", "score", "time", "state"]], ["recipe"]
    for path in find_runs(folder):
        try:
            run = read_run(path)
            rows.append(_row(run, folder))
            tails.append(_tail(run))
        except InputError as error:  # a bad folder is a line like any other
            rows.append([_name(path, folder), "", "", "", "", "", "cannot be read"])
            tails.append(f"({error})")
    for line, tail in zip(aligned(rows), tails, strict=True):
        typer.echo(f"{line}  {tail}".rstrip())


def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN RUN...")],
) -> None:
    """Show runs side by side: settings that differ, courses, final scores."""
    from stage_rl.report.compare import compare as tables  # reads recipes, which loads torch

    typer.echo(tables(folders))


def watch(folder: Folder) -> None:
    """Follow a run that another process trains; Ctrl-C ends the watching alone."""
    run, shown = read_run(folder), 0
    with live_view(first=0, last=run.num_steps) as view:
        while True:
            # The steps before are history: the last one says where the run is.
            for step in run.steps[shown or -1 :]:
                view.show(step["step"] + 1, step)
            shown = len(run.steps)
            if run.ended:
                break
            time.sleep(POLL_S)
            run = read_run(folder)
        view.say(f"{folder}: {_state(run)}")


def _row(run: Run, root: Path) -> list[str]:
    score = run.score()
    return [
        _name(run.folder, root),
        f"{len(run.steps)}/{run.num_steps}",
        *("" if (value := run.recent(m)) is None else f"{value:.3f}" for m in SHOWN),
        f"{score[0]} {score[1]:.3f}" if score else "",
        duration(run.seconds),
        run.state,
    ]


def _name(folder: Path, root: Path) -> str:
    return str(folder) if folder == root else folder.relative_to(root).as_posix()


SHOWN = ("reward/mean", "kl/mean")


def _tail(run: Run) -> str:
    """What has no width of its own."""
    return " ".join([run.recipe, *run.overrides, *([f"({run.why})"] if run.why else [])])


def _state(run: Run) -> str:
    return f"{run.state} after {len(run.steps)} steps{f': {run.why}' if run.why else ''}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they are needed."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
