"""`stage train`: trains a recipe, or goes on with its run, and compares what came out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stage_rl.errors import Stopped
from stage_rl.recipes import find_recipe

if TYPE_CHECKING:
    from stage_rl.recipe import Recipe


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a built-in recipe, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings as dotted.key=value.", metavar="[KEY=VALUE]..."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the resolved recipe and the memory it needs; stop."),
    ] = False,
) -> None:
    """Train a recipe; the same command again goes on where the run stopped."""
    find_recipe(recipe)  # a wrong name is answered without loading torch
    from stage_rl import config
    from stage_rl.distributed import launched

    settings = config.load_recipe(recipe, overrides or ())
    started = launched()
    if dry_run:
        if started.rank == 0:
            typer.echo(f"# Run folder: {config.run_folder(settings)}")
            typer.echo(config.describe(settings), nl=False)
            _say_needs(settings, num_processes=started.size)
        return
    from stage_rl.training.loop import train as run

    if started.rank == 0:
        _say_leaks(settings)
    folder = run(settings)
    if started.rank:
        return
    if settings.evaluation is not None and settings.evaluation.images_per_task:
        typer.echo(_evaluation(settings, folder))
    typer.echo(f"run: {folder}")


def _say_needs(settings: Recipe, *, num_processes: int) -> None:
    """Says what would be downloaded and what memory is needed; a RecipeError where it is not there.

    Nothing is loaded.
    """
    from stage_rl.training.memory import check_memory, gpu_memory_gb, plan_of, report

    memory_gb = gpu_memory_gb(settings) if plan_of(settings) else None
    for line in report(settings, memory_gb, num_processes=num_processes):
        typer.echo(f"# {line}")
    check_memory(settings, memory_gb, num_processes=num_processes)


def _say_leaks(settings: Recipe) -> None:
    """Says on stderr which prompts of the evaluation are training prompts too."""
    if settings.evaluation is None:
        return
    from stage_rl.evaluation.suites import find_suite
    from stage_rl.prompts.leakage import find_leaks, sentence

    held_out = find_suite(settings.evaluation.benchmark).prompt_set.prompts(None)
    found = sentence(find_leaks(settings.prompts.build(), held_out), len(held_out))
    if found:
        typer.echo(f"{settings.evaluation.benchmark}: {found}", err=True)


def _evaluation(settings: Recipe, folder: Path) -> str:
    """The comparison of base and trained policy; made once for every number of steps."""
    from stage_rl.api import load
    from stage_rl.distributed import pick_device
    from stage_rl.evaluation.run import evaluate_run
    from stage_rl.files import replace_text
    from stage_rl.training.checkpoint import latest_checkpoint
    from stage_rl.training.run import RunFolder

    saved = latest_checkpoint(RunFolder(folder).checkpoints)
    assert settings.evaluation is not None
    assert saved is not None
    kept = folder / "evaluation.txt"
    # The run may have more steps than this recipe asks for.
    head = f"after {saved.state.step} steps; "
    if kept.exists() and kept.read_text(encoding="utf-8").startswith(head):
        return kept.read_text(encoding="utf-8")
    device = pick_device(settings.training.device, key="training.device")
    with _stopped_by_signals():
        table = evaluate_run(
            settings.policy.build(device),
            load(folder, device),
            evaluation=settings.evaluation,
            guidance_scale=settings.rollout.guidance_scale,
            out=folder,
        )
    text = f"{head}{table}\nimages: {folder / 'before_after.png'}"
    replace_text(kept, text)
    return text


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM into a `Stopped` with the exit code of the signal."""

    def stop(number: int, _frame: object) -> None:
        said = "stopped during the evaluation; run the same command again to evaluate"
        raise Stopped(said, signal_number=number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
