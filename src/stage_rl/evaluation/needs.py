"""What a benchmark needs and what of it is missing on this machine; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from stage_rl.errors import InputError
from stage_rl.evaluation.published import WEIGHTS
from stage_rl.evaluation.results import aligned
from stage_rl.evaluation.suites import Overrides, Suite, scorers_of
from stage_rl.evaluation.understanding import BENCHMARKS, Understanding, check_pictures


def missing_data(suite: Suite, data: Path | None) -> str | None:
    """The prompts that --data does not have, in words; None: they are there."""
    prompt_set = suite.prompt_set
    if prompt_set.load is not None or prompt_set.find(data) is not None:
        return None
    return f"--data has no {prompt_set.where}"


def missing_parts(suite: Suite, overrides: Overrides) -> list[str]:
    """The packages and programs of its rewards that are not on this machine, in words; a wrong
    setting is an `InputError`.
    """
    configs = [config for _, config in scorers_of(suite, overrides, smoke=False).values()]
    return list(dict.fromkeys(one for config in configs for one in config.missing()))


def missing_weights(suite: Suite, overrides: Overrides) -> list[str]:
    """The weights of its rewards that are not on this machine; as `missing_parts`."""
    configs = [config for _, config in scorers_of(suite, overrides, smoke=False).values()]
    paths = [path for config in configs for path in _weights(config.model_dump())]
    return [path for path in dict.fromkeys(paths) if not is_here(path)]


def is_here(path: str) -> bool:
    """Whether weights are a file or folder, or a hub id that was downloaded before."""
    if Path(path).expanduser().exists():
        return True
    snapshots = Path(HF_HUB_CACHE) / f"models--{path.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())


def needs_table(suites: list[Suite], data: Path | None, overrides: Overrides) -> str:
    """A line for each benchmark: prompts, who judges, what of a GPU it takes, what is missing."""
    rows = [["benchmark", "prompts", "judged by", "on one GPU", "missing here"]]
    rows += [_row(suite, data, overrides) for suite in suites]
    for one in BENCHMARKS.values():
        rows.append([one.name, one.size, "the model answers", "minutes", _lacks(one, data)])
    there = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if there else 0
    here = f"{memory / 1e9:.0f} GB" if there else "none"
    # Texts of such lengths read better from the left.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [line.rstrip() for line in aligned(padded)]
    return "\n".join([*lines, "", f"GPU memory here: {here}. Memory and times are estimates."])


def _row(suite: Suite, data: Path | None, overrides: Overrides) -> list[str]:
    size = suite.prompt_set.size
    prompts = f"{size} x {suite.images_per_prompt}" if size else "its own"
    judges = ", ".join(
        _judge({**scorer.settings, **(overrides.get(name) or {})})
        for name, scorer in suite.scorers.items()
    )
    absent = missing_data(suite, data)
    missing = [absent] if absent else []
    try:
        missing += [*missing_weights(suite, overrides), *missing_parts(suite, overrides)]
    except InputError as error:
        missing.append(str(error).partition(";")[0].removeprefix(f"{suite.name}: "))
    gpu = suite.gpu or "not measured"
    return [suite.name, prompts, judges, gpu, "; ".join(missing) or "nothing"]


def _lacks(asked: Understanding, data: Path | None) -> str:
    """What a benchmark of understanding lacks of its pictures, in words."""
    try:
        check_pictures(asked.name, data)
    except InputError as error:
        return str(error).partition(";")[0]
    return "nothing"


def _judge(settings: Mapping[str, Any]) -> str:
    """A reward by its weights where it names some, else by its kind."""
    if settings["kind"] == "external":
        return Path(str(settings["command"][-1])).stem
    return str(settings.get("path", settings["kind"].rpartition(":")[2]))


def _weights(settings: Any) -> Iterator[str]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key in WEIGHTS and isinstance(value, str):
                yield value
            else:
                yield from _weights(value)
