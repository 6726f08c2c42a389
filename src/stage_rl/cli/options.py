"""What verbs share: options from a function's own signature, numbers and files of options."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from stage_rl.errors import InputError, StageError
from stage_rl.settings import near_or_all

FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Typer settings of a command that hands its arguments to `call`."""


def call(function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Calls a function of keyword parameters with `--name value` pairs, `--flag` for a bool.

    A value takes the type of the parameter's default; the items of a tuple are parted by commas.
    `--help` prints the parameters and stops.
    Raises InputError for an unknown option, a missing value and a value of another type.
    """
    parameters = {
        f"--{name.rstrip('_').replace('_', '-')}": parameter
        for name, parameter in inspect.signature(function).parameters.items()
    }
    if "--help" in arguments:
        typer.echo(f"{inspect.getdoc(function) or ''}\n\nOptions and their defaults:")
        for option, parameter in parameters.items():
            typer.echo(f"  {option} {parameter.default}")
        raise typer.Exit
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if option not in parameters:
            raise InputError(f"{option}: unknown option; {near_or_all(option, parameters)}")
        parameter = parameters[option]
        if not equals and isinstance(parameter.default, bool):
            text = "true"
        elif not equals:
            if not rest:
                raise InputError(f"{option}: the value is missing; write {option} VALUE")
            text = rest.pop(0)
        values[parameter.name] = _typed(option, text, parameter.default)
    return function(**values)


def finite(value: float | None) -> float | None:
    """Refuses nan and inf as the value of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def check_writable(file: Path | None) -> None:
    """Raises InputError where a file cannot be written because its folder is missing."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: no folder '{file.parent}'; name a folder that is")


def write_json(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes figures where a file is given; raises StageError where it cannot be written."""
    if file is not None:
        with writing("--json", file):
            file.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", "utf-8")


@contextlib.contextmanager
def writing(option: str, file: Path) -> Iterator[None]:
    """Raises StageError where the file of an option cannot be written in the block."""
    try:
        yield
    except OSError as error:
        raise StageError(f"{option} {file}: {error.strerror}; name another file") from error


def _typed(option: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
        raise InputError(f"{option}: expected true or false, not '{text}'; write one of them")
    if isinstance(default, tuple):
        return tuple(_typed(option, part, default[0]) for part in text.split(","))
    if not isinstance(default, (int, float)):
        return text
    wanted = "a whole number" if isinstance(default, int) else "a number"
    try:
        value = type(default)(text)
    except ValueError as error:
        raise InputError(f"{option}: '{text}' is not {wanted}; write {wanted}") from error
    if not math.isfinite(value):
        raise InputError(f"{option}: '{text}' is not a finite number; write one")
    return value
