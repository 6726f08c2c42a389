"""Options taken from a function's own signature, so that no setting is declared twice."""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from stage_rl.errors import InputError, StageError

FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Typer settings of a command that hands its arguments to `call`."""


def call(function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Calls a function of keyword parameters with `--name value` pairs, `--flag` for a bool.

    A value takes the type of the parameter's default; the items of a tuple are parted by commas.
    `--help` prints the parameters and stops.
    Raises InputError for an unknown option, a missing value and a value of another type.
    """
    defaults = {
        name.rstrip("_"): parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }
    if "--help" in arguments:
        typer.echo(_help(function, defaults))
        raise typer.Exit
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, inline = rest.pop(0).partition("=")
        name = _known(option, defaults)
        if equals:
            text = inline
        elif isinstance(defaults[name], bool):
            text = "true"
        elif rest:
            text = rest.pop(0)
        else:
            raise InputError(f"{option}: the value is missing; write {option} VALUE")
        options[name] = _typed(option, text, defaults[name])
    return function(**_as_parameters(function, options))


def check_writable(file: Path | None) -> None:
    """Raises InputError where a file cannot be written because its folder is missing."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: no folder '{file.parent}'; name a folder that is")


def write_json(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes figures where a file is given; raises StageError where it cannot be written."""
    if file is None:
        return
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StageError(f"--json {file}: {error.strerror}; name another file") from error


def finite(value: float | None) -> float | None:
    """Refuses nan and inf as the value of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _known(option: str, defaults: Mapping[str, Any]) -> str:
    name = option.removeprefix("--").replace("-", "_")
    if option.startswith("--") and name in defaults:
        return name
    names = [_spelled(known) for known in defaults]
    near = difflib.get_close_matches(option, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"write one of: {', '.join(names)}"
    raise InputError(f"{option}: unknown option; {hint}")


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


def _as_parameters(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    names = {name.rstrip("_"): name for name in inspect.signature(function).parameters}
    return {names[name]: value for name, value in options.items()}


def _help(function: Callable[..., Any], defaults: Mapping[str, Any]) -> str:
    lines = [inspect.getdoc(function) or "", "", "Options and their defaults:"]
    return "\n".join([*lines, *(f"  {_spelled(n)} {value}" for n, value in defaults.items())])


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"
