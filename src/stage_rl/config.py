"""From a recipe's name or file to a checked `Recipe`, and back to text.

Every mistake is a `RecipeError` of one line: RECIPE: dotted.key: what; what to write instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from yaml import MarkedYAMLError, YAMLError

from stage_rl.errors import InputError, RecipeError
from stage_rl.recipe import Origin, Recipe
from stage_rl.recipes import find_recipe, is_run
from stage_rl.rewards.base import RewardConfig
from stage_rl.run_records import record_of
from stage_rl.settings import Component, Settings, did_you_mean

COMMENT_COLUMN = 44

DEEPEST = 100
"""Levels of brackets in a recipe."""

OCTAL = re.compile(r"[-+]?0[0-9_]*[1-9][0-9_]*")

FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")

RENAMED = {
    "evaluation.panel_images_per_task": "evaluation.validation_images_per_task",
    "evaluation.panel_seed": "evaluation.validation_seed",
    "tripwires.panel_drop": "tripwires.validation_drop",
}
"""Keys of former versions, and what they are called now."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a built-in recipe by name, a file, or that of a run folder, with overrides of the form
    dotted.key=value.

    The file's stem is the run's name where the file gives none; the recipe of a run folder goes on
    with that run. Raises RecipeError.
    """
    where = str(name_or_path)
    source = find_recipe(where)
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecipeError(f"{where}: cannot be read ({reason}); name a recipe file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: is not UTF-8 text; name a recipe file") from error
    tree = read_yaml(text, where)
    if not tree:
        raise RecipeError(f"{where}: is empty; start from `stage recipes show NAME`")
    for override in overrides:
        _apply(tree, override, where)
    try:
        values, secrets = _plain(tree, where)
    except RecursionError as error:
        raise RecipeError(f"{where}: {_too_much(error)}") from error
    values.setdefault("name", Path(source.name).stem)
    comment = "".join(takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    origin = Origin(where, tuple(overrides), comment)
    if is_run(where):
        origin = _origin_of_run(Path(where), overrides)
    origin = replace(origin, references=_references(tree, values, secrets))
    if is_run(where) and not any(override.startswith("run.dir=") for override in overrides):
        values["run"] = {**values.get("run", {}), "dir": where}
    try:
        return Recipe.model_validate(values, context={"origin": origin})
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, secrets)}") from error


def _origin_of_run(folder: Path, overrides: Sequence[str]) -> Origin:
    """What a run was begun with and the overrides that it goes on with, the last ones of a key."""
    try:
        status = record_of(folder / "status.json")
        source, before = status["recipe"], status["overrides"]
    except (InputError, KeyError):
        source, before = str(folder), []  # of a former version
    last = {text.partition("=")[0]: text for text in [*before, *overrides]}
    return Origin(source, tuple(last.values()))


def load_reward(kind: str, overrides: Sequence[str] = ()) -> RewardConfig:
    """A reward by built-in name or module:Class, with settings of the form dotted.key=value.

    Raises RecipeError.
    """
    tree = OmegaConf.create({"kind": kind})
    for override in overrides:
        _apply(tree, override, kind)
    values, secrets = _plain(tree, kind)
    try:
        return RewardConfig.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{kind}: {explain(error, secrets)}") from error


def describe(recipe: Recipe) -> str:
    """The resolved recipe as YAML with every key explained; itself a recipe that gives the same."""
    lines = (
        f"{line:<{COMMENT_COLUMN}} # {comment}" if comment else line
        for line, comment in _lines(recipe, recipe.origin.references)
    )
    return "\n".join(lines) + "\n"


def resolved_json(recipe: Recipe) -> str:
    """The resolved recipe as JSON; `load_recipe` reads it back."""
    if not recipe.origin.references:
        return recipe.model_dump_json(indent=2) + "\n"
    return json.dumps(values_to_show(recipe), indent=2, ensure_ascii=False) + "\n"


def values_to_show(recipe: Recipe) -> dict[str, Any]:
    """The tree of a recipe for files and pages, where a value of the environment is a reference."""
    return put_references(recipe.model_dump(mode="json"), recipe.origin.references)


def put_references(value: Any, references: Mapping[str, str], key: str = "") -> Any:
    """A tree at a dotted key with the texts that references stand for replaced by them."""
    start = f"{key}." if key else ""
    if isinstance(value, dict):
        return {k: put_references(one, references, f"{start}{k}") for k, one in value.items()}
    if isinstance(value, list):
        return [put_references(one, references, f"{start}{n}") for n, one in enumerate(value)]
    return references.get(key, value) if isinstance(value, str) else value


def references_in(tree: Any) -> dict[str, str]:
    """By dotted key the texts of a tree that read the environment."""
    return {
        key: text
        for key, text in flatten(tree)
        if isinstance(text, str) and FROM_ENVIRONMENT.search(text)
    }


def written_out(recipe: Recipe) -> str:
    """`describe` under the comment that the recipe's file opens with, and what it was read from."""
    origin = recipe.origin
    words = " ".join(" ".join([origin.source, *origin.overrides]).split())
    command = f"# Every setting of: {words}\n\n" if words else ""
    return f"{origin.comment}{command}{describe(recipe)}"


def run_hash8(recipe: Recipe) -> str:
    """Eight hexadecimal digits for everything in a recipe that may not change during a run."""
    tree = flatten(values_to_show(recipe))
    values = {key: value for key, value in tree if not recipe.may_change(key)}
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_folder(recipe: Recipe) -> Path:
    """Where the run of a recipe lives."""
    return Path(recipe.run.dir or f"runs/{recipe.name}-{run_hash8(recipe)}").expanduser()


def diff_recipes(one: Recipe, other: Recipe) -> tuple[str, ...]:
    """The dotted keys in which two recipes differ, in the order of the recipe."""
    left = dict(flatten(values_to_show(one)))
    right = dict(flatten(values_to_show(other)))
    absent = object()
    keys = dict.fromkeys([*left, *right])
    return tuple(key for key in keys if left.get(key, absent) != right.get(key, absent))


def read_yaml(text: str, where: str) -> DictConfig:
    """A mapping in YAML, unresolved; a `RecipeError` for anything else."""
    try:
        _check_yaml(text, where)
        tree = OmegaConf.load(io.StringIO(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{where}: {_yaml_reason(error)}") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: {_too_much(error)}") from error
    except OSError:  # OmegaConf's answer to a bare number
        tree = None
    # OmegaConf reads bare text as a mapping of that text to nothing.
    if not isinstance(tree, DictConfig) or (len(tree) == 1 and tree == dict.fromkeys(tree)):
        raise RecipeError(f"{where}: is not a mapping; write lines of the form key: value")
    return tree


def _too_much(error: Exception) -> str:
    """What the readers of YAML raise on nesting without end, and on numbers of 5,000 digits."""
    if isinstance(error, RecursionError):
        return "is nested too deeply; write fewer levels"
    return f"holds a value that cannot be read ({' '.join(str(error).split())[:80]}); write another"


def _check_yaml(text: str, where: str) -> None:
    """YAML reads 010 as 8, which nobody means; for deep nesting its reader takes hours."""
    depth = 0
    for sign in text:
        depth += (sign in "[{") - (sign in "]}")
        if depth > DEEPEST:
            raise RecursionError
    for token in yaml.scan(text):
        if isinstance(token, yaml.ScalarToken) and token.plain and OCTAL.fullmatch(token.value):
            meant = token.value.lstrip("0")
            raise RecipeError(f"{where}: {token.value} would be octal; write {meant}, or '{meant}'")


def _yaml_reason(error: Exception) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"{str(error).splitlines()[0]}; write plain keys and values"
    hint = "write each key once" if "duplicate key" in str(error.problem) else "correct the YAML"
    return f"line {error.problem_mark.line + 1}: {error.problem}; {hint}"


def _apply(tree: DictConfig, override: str, where: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"{where}: {override}: is not an override; write dotted.key=value")
    if not text.strip():  # as of a shell's variable that is not set
        raise RecipeError(f"{where}: {override}: has no value; write one, or {key}=null")
    try:
        _check_yaml(text, f"{where}: {key}")
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: {key}: {_too_much(error)}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{where}: {key}: the value is not YAML; quote it") from error
    assert isinstance(parsed, dict)
    try:
        OmegaConf.update(tree, key, parsed["value"], merge=False)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        # The latter two are OmegaConf's answers to a word where the number of an item belongs.
        hint = "write the number of an item, from 0"
        raise RecipeError(f"{where}: {key}: no such list item; {hint}") from error
    except IndexError as error:  # OmegaConf's answer to a bracket without a word before it
        raise RecipeError(
            f"{where}: {override}: is not an override; write dotted.key=value"
        ) from error


def _plain(tree: DictConfig, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a tree, and what of them the environment gave, as `read_environment` does."""
    with read_environment() as secrets:
        try:
            values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "recipe"
            reason = masked(str(error).splitlines()[0], secrets)
            raise RecipeError(f"{where}: {key}: {reason}; write the value itself") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, secrets


@contextlib.contextmanager
def read_environment() -> Iterator[dict[str, str]]:
    """By each value that `${oc.env:NAME}` gives within the block, that text.

    OmegaConf itself tells them, however the text is quoted, nested or referred to.
    """
    found: dict[str, str] = {}

    def env(name: str, *default: Any) -> Any:
        value = oc.env(name, *default)
        if value and name in os.environ:
            found[value] = f"${{oc.env:{name}}}"
        return value

    OmegaConf.register_resolver("oc.env", env, replace=True)
    try:
        yield found
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def masked(text: str, secrets: Mapping[str, str]) -> str:
    """A text with references in the place of what the environment gave, the longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, secrets[secret])
    return text


def _references(
    tree: DictConfig, values: Mapping[str, Any], secrets: Mapping[str, str]
) -> dict[str, str]:
    """By dotted key the text behind each value that holds something of the environment."""
    texts = dict(flatten(OmegaConf.to_container(tree, resolve=False)))
    found = {}
    for key, value in flatten(values):
        text = _text_behind(key, texts)
        if FROM_ENVIRONMENT.search(text) and key in texts:
            found[key] = text
        elif "${" in text and (hidden := masked(str(value), secrets)) != str(value):
            found[key] = hidden  # by way of another key
    return found


def _text_behind(key: str, texts: Mapping[str, Any]) -> str:
    """What is written at a dotted key, or above it, where one text stands for a whole mapping."""
    while key and key not in texts:
        key = key.rpartition(".")[0]
    return str(texts.get(key, ""))


def _lines(
    settings: Settings, references: Mapping[str, str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """The YAML lines of one mapping, unindented, each with its comment."""
    if isinstance(settings, Component):
        yield f"kind: {json.dumps(settings.kind)}", ""
    for key, info in type(settings).model_fields.items():
        value = getattr(settings, key)
        comment = " ".join((info.description or "").split())
        if isinstance(value, Settings):
            yield f"{key}:", comment or (type(value).__doc__ or "")
            lines = _lines(value, references, f"{prefix}{key}.")
            yield from ((f"  {line}", said) for line, said in lines)
        elif isinstance(value, tuple) and any(isinstance(item, Settings) for item in value):
            yield f"{key}:", comment
            yield from _items(value, references, f"{prefix}{key}.")
        else:
            plain = settings.model_dump(mode="json", include={key})[key]
            plain = put_references(plain, references, f"{prefix}{key}")
            yield f"{key}: {json.dumps(plain, ensure_ascii=False)}", comment


def _items(
    settings: Iterable[Settings], references: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, str]]:
    for place, item in enumerate(settings):
        lines = _lines(item, references, f"{prefix}{place}.")
        for number, (line, comment) in enumerate(lines):
            yield f"  {'- ' if number == 0 else '  '}{line}", comment


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a tree of mappings and lists."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in pairs:
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


# A failed validation in one line: dotted.key: what; what to write instead.


EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "model_type": "a mapping of keys",
    "string_type": "a text in quotes",
    "tuple_type": "a list",
}

BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}


def explain(error: ValidationError, secrets: Mapping[str, str] | None = None) -> str:
    """The first mistake of a failed validation, and how many more there are; without the `secrets`,
    which `read_environment` gives.
    """
    secrets = secrets or {}
    first, *others = error.errors(include_url=False)
    details = first.get("ctx", {})
    parts = [str(part) for part in first["loc"]]
    key = ".".join([*parts, *filter(None, [details.get("key")])])
    own = first["type"] == "stage"
    text = masked(details["text"], secrets) if own else _reason(first, secrets)
    # A list whose item is wrong is also reported as too short.
    more = sum(other["loc"] != first["loc"][:1] for other in others)
    tail = f" (and {more} more)" if more else ""
    return f"{key}: {_hint(key, text)}{tail}"


def _reason(error: ErrorDetails, secrets: Mapping[str, str]) -> str:
    kind, details = error["type"], error.get("ctx", {})
    given = _show(error["input"], secrets)
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


def _show(value: Any, secrets: Mapping[str, str]) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    # Before it is cut: a part of a secret is one too.
    text = masked(text, {repr(secret)[1:-1]: name for secret, name in secrets.items()})
    return text if len(text) <= 40 else f"{text[:37]}..."


def _allowed(expected: str, given: Any) -> str:
    names = re.findall(r"'([^']*)'", expected)
    return did_you_mean(given, names) if names and isinstance(given, str) else f"write {expected}"


def _hint(key: str, text: str) -> str:
    """Answers a former key, or one in the wrong section such as `lr`, with the right one."""
    if key in RENAMED:
        return f"was renamed; write '{RENAMED[key]}'"
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
