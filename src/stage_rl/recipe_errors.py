"""A failed validation in one line: dotted.key: what; what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from stage_rl.schema import Recipe
from stage_rl.settings import Settings, near_or_all

EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a mapping of keys",
    "string_type": "a text in quotes",
    "tuple_type": "a list",
}
BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def explain(error: ValidationError) -> str:
    """The first mistake of a failed validation, and how many more there are."""
    first, *others = error.errors(include_url=False)
    details = first.get("ctx", {})
    parts = [str(part) for part in first["loc"]]
    key = ".".join([*parts, *filter(None, [details.get("key")])])
    text = details["text"] if first["type"] == "stage" else _reason(first)
    # A list whose item is wrong is also reported as too short.
    more = sum(other["loc"] != first["loc"][:1] for other in others)
    tail = f" (and {more} more)" if more else ""
    return f"{key}: {_look_elsewhere(key, text)}{tail}"


def _reason(error: ErrorDetails) -> str:
    kind, details = error["type"], error.get("ctx", {})
    given = _show(error["input"])
    if kind in EXPECTED:
        return f"expected {EXPECTED[kind]}, not {given}"
    if kind == "missing":
        return "is required; write a value"
    if kind == "literal_error":
        return f"unknown value {given}; {_allowed(details['expected'], error['input'])}"
    if kind == "string_pattern_mismatch":
        return f"{given} will not do; write letters, digits, '_', '.' and '-' only"
    if kind == "too_short":
        return f"has {details['actual_length']} items; write at least {details['min_length']}"
    if kind == "too_long":
        return f"has {details['actual_length']} items; write at most {details['max_length']}"
    for bound, word in BOUNDS.items():
        if bound in details:
            return f"{given} is out of range; write a number {word} {details[bound]:g}"
    return f"{given}: {error['msg']}"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _allowed(expected: str, given: Any) -> str:
    names = re.findall(r"'([^']*)'", expected)
    return near_or_all(given, names) if names and isinstance(given, str) else f"write {expected}"


def _look_elsewhere(key: str, text: str) -> str:
    """Answers a key in the wrong section, such as `lr`, with its full name."""
    if not text.startswith("unknown key") or "did you mean" in text:
        return text
    word = key.rpartition(".")[2]
    near = [known for known in _dotted_keys(Recipe) if known.rpartition(".")[2] == word]
    return f"unknown key; did you mean {' or '.join(map(repr, near))}?" if near else text


def _dotted_keys(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    for key, info in settings.model_fields.items():
        yield f"{prefix}{key}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, Settings):
            yield from _dotted_keys(info.annotation, f"{prefix}{key}.")
