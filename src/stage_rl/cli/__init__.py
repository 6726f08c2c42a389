"""The command `stage`: one small module per verb.

Verbs import what they run inside their functions, so that help and a wrong recipe are answered
without loading torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from stage_rl.allocator import let_segments_grow
from stage_rl.cli import (
    bench,
    data,
    evaluate,
    export,
    figure,
    recipes,
    report,
    rewards,
    runs,
    sample,
    shapes,
    study,
    train,
)
from stage_rl.errors import InputError, StageError, Stopped
from stage_rl.openmp import limit_spinning

app = typer.Typer(
    name="stage",
    help="Trains autoregressive text-to-image models with STAGE (arXiv 2509.25027).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stage-rl {metadata.version('stage-rl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print it and stop."),
    ] = False,
) -> None:
    """What stands before the verb."""


app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("eval")(evaluate.evaluate)
app.command("export")(export.export)
app.command("study")(study.study)
app.command("runs")(runs.runs)
app.command("compare")(runs.compare)
app.command("watch")(runs.watch)
app.command("report")(report.report)
app.add_typer(recipes.app, name="recipes")
app.add_typer(data.app, name="data")
app.add_typer(rewards.app, name="rewards")
app.add_typer(bench.app, name="bench")
app.add_typer(figure.app, name="figure")
app.add_typer(shapes.app, name="shapes")


UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What a wrong command line raises, in the click that typer brings or in click itself."""


class Signalled(BaseException):
    """A signal where no step waits to be finished: while things are loaded, or at the end."""

    def __init__(self, number: int, _frame: object) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Runs the command line; exit codes: 0 done, 1 failed, 2 wrong input, 128 + N by signal N."""
    limit_spinning()
    let_segments_grow()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no terminal fails on a name it cannot show
            stream.reconfigure(errors="backslashreplace")
    code = _run()
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _failed_to_print(error)
    sys.exit(code)


def _run() -> int:
    """Calls the verb; its exit code, after the one line of what went wrong."""
    try:
        # A recipe may name a module:Class that lies in the working directory.
        sys.path.append(_working_folder())
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _raise_signal)
        code = app(standalone_mode=False)
        if code == 130:
            print(STOPPED, file=sys.stderr)
        return code or 0
    except UsageError as error:
        _say_usage(error)
        return 2
    except StageError as error:
        print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Signalled) as error:
        print(STOPPED, file=sys.stderr)
        return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)
    except SystemExit as error:
        if error.code:  # of a process among several, whose first one speaks
            return error.code if isinstance(error.code, int) else 1
        print("error: code that the recipe names ended the process; mend it", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:
        text = f"'{error.object:.60}' cannot be written in this locale; set LC_ALL=C.UTF-8"
        print(f"error: {text}", file=sys.stderr)
        return 2
    except OSError as error:
        return _failed_to_print(error) if error.filename is None else _say_os_error(error)


STOPPED = "stopped; the same command starts again"


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the working folder is gone; change to another") from error


def _raise_signal(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Signalled(number, frame)


def _say_os_error(error: OSError) -> int:
    name = str(error.filename)
    where = name if len(name) <= 100 else f"{name[:97]}..."
    print(f"error: {where}: {error.strerror}", file=sys.stderr)
    return 1


def _failed_to_print(error: OSError) -> int:
    """Nobody reads the output any more, or the disk it goes to is full."""
    if error.errno is None:
        raise error
    if not isinstance(error, BrokenPipeError):
        print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _say_usage(error: Any) -> None:
    """One line; the help of a command without arguments as it is."""
    message = error.format_message()
    if "\n" in message:
        error.show()
        return
    if message.startswith("No such option") and sys.argv[1:2] == ["train"]:
        message += "; a setting is written key=value"
    print(f"error: {message}", file=sys.stderr)
