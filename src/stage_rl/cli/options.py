"""What verbs share: options from a function's own signature, numbers and files of options."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import ConfigDict, Field, ValidationError, create_model

from stage_rl.errors import InputError, StageError
from stage_rl.recipes import list_recipes
from stage_rl.settings import did_you_mean

FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Typer settings of a command that hands its arguments to `read_options`."""


def writable(file: Path | None) -> Path | None:
    """Refuses a file that cannot be written, or that is there already."""
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: no folder '{file.parent}'; name a folder that is")
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise InputError(f"--json {file}: no file can be written there; name another")
    if file is not None:
        refuse_taken("--json", file)
    return file


def refuse_taken(option: str, file: Path, *beside: str) -> None:
    """An InputError for the file of an option, or one beside it by its suffix, that is there: no
    option writes over what somebody has.
    """
    for one in (file, *map(file.with_suffix, beside)):
        if one.is_file():
            raise InputError(f"{option} {one}: is there already; name another, or remove it first")


def free_name(file: Path, *beside: str) -> Path:
    """The file, or NAME-2, NAME-3 ... where one is there: for a name that nobody has asked for."""
    free, number = file, 1
    while any(one.exists() for one in (free, *map(free.with_suffix, beside))):
        number += 1
        free = file.with_stem(f"{file.stem}-{number}")
    return free


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as dotted.key=value.", metavar="[KEY=VALUE]..."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Write all figures to this file."),
]


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """The built-in recipes that begin so, with their purpose, for the shell."""
    return [(name, text) for name, text in list_recipes().items() if name.startswith(incomplete)]


def read_options(function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of a function from `--name value` pairs, `--flag` for a bool.

    A value is what the parameter's annotation says; the items of a tuple are parted by commas.
    `--help` prints the parameters and stops. A wrong option is an InputError.
    """
    parameters = {
        f"--{name.replace('_', '-')}": parameter
        for name, parameter in inspect.signature(function).parameters.items()
    }
    if {"-h", "--help"} & set(arguments):
        typer.echo(f"{inspect.getdoc(function) or ''}\n\nOptions and their defaults:")
        for option, parameter in parameters.items():
            typer.echo(f"  {option} {parameter.default}")
        raise typer.Exit
    texts: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        if option not in parameters:
            raise InputError(f"{option}: unknown option; {did_you_mean(option, parameters)}")
        default = parameters[option].default
        if not equals and isinstance(default, bool):
            text = "true"
        elif not equals:
            if not rest:
                raise InputError(f"{option}: the value is missing; write {option} VALUE")
            text = rest.pop(0)
        texts[option] = text.split(",") if isinstance(default, tuple) else text
    return _typed(function, parameters, texts)


def _typed(
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    texts: Mapping[str, Any],
) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        parameter.name: (hints[parameter.name], Field(parameter.default, alias=option))
        for option, parameter in parameters.items()
    }
    options = create_model("Options", __config__=ConfigDict(allow_inf_nan=False), **fields)
    try:
        return dict(options.model_validate(texts))
    except ValidationError as error:
        from stage_rl.config import explain  # loads torch, which --help does without

        raise InputError(explain(error)) from error


def finite(value: float | None) -> float | None:
    """Refuses nan and inf as the value of an option."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


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
