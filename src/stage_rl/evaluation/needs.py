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
    named = dict.fromkeys(one for config in configs for one in _weights(config.model_dump()))
    lacking = [path for key, path in named if not is_here(path, has_weights=key != "base")]
    return list(dict.fromkeys(lacking))


ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


def is_here(path: str, *, has_weights: bool = True) -> bool:
    """Whether weights are a file, a folder, or a hub id that was downloaded before; of folders one
    that holds such a file, or without `has_weights` any.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return True
    hub = Path(HF_HUB_CACHE) / f"models--{path.replace('/', '--')}" / "snapshots"
    folder = local if local.is_dir() else hub
    return any(
        file.is_file() and (file.suffix in ENDINGS or not has_weights)
        for file in folder.glob("**/*")
    )


HEADS = ("benchmark", "prompts", "judged by", "GPU, GB", "minutes", "missing here")

NOT_KNOWN = "not known"


def needs_table(suites: list[Suite], data: Path | None, overrides: Overrides) -> str:
    """A line for each benchmark: prompts, who judges, what of a GPU it takes, what is missing."""
    has_gpu = torch.cuda.is_available()
    here_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if has_gpu else 0.0
    rows = [list(HEADS), *(_row(suite, data, overrides, here_gb) for suite in suites)]
    rows += [
        [one.name, one.size, "the model answers", NOT_KNOWN, NOT_KNOWN, _lacks(one, data)]
        for one in BENCHMARKS.values()
    ]
    # Texts of such lengths read better from the left.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [line.rstrip() for line in aligned(padded)]
    here = f"{here_gb:.0f} GB" if here_gb else "none"
    return "\n".join([*lines, "", f"GPU memory here: {here}. Memory and times are estimates."])


def _row(suite: Suite, data: Path | None, overrides: Overrides, here_gb: float) -> list[str]:
    size, known = suite.prompt_set.size, (suite.gpu_gb, suite.minutes)
    prompts = f"{size} x {suite.images_per_prompt}" if size else "its own"
    absent = missing_data(suite, data)
    missing = [absent] if absent else []
    try:
        configs = scorers_of(suite, overrides, smoke=False)
        judges = [_judge(config.model_dump()) for _, config in configs.values()]
        missing += [*missing_weights(suite, overrides), *missing_parts(suite, overrides)]
    except InputError as error:
        judges = [_judge(scorer.settings) for scorer in suite.scorers.values()]
        missing.append(str(error).partition(";")[0].removeprefix(f"{suite.name}: "))
    if suite.gpu_gb is not None and suite.gpu_gb > here_gb:
        missing.append(f"a GPU of {suite.gpu_gb:g} GB")
    numbers = [NOT_KNOWN if number is None else f"{number:g}" for number in known]
    judged_by = ", ".join(dict.fromkeys(judges))
    return [suite.name, prompts, judged_by, *numbers, "; ".join(missing) or "nothing"]


def _lacks(asked: Understanding, data: Path | None) -> str:
    """What a benchmark of understanding lacks of its pictures, in words."""
    try:
        check_pictures(asked.name, data)
    except InputError as error:
        return str(error).partition(";")[0]
    return "nothing"


def _judge(settings: Mapping[str, Any]) -> str:
    """A reward by its program, its weights or its engine, whichever it has, else by its kind."""
    if settings["kind"] == "external":
        return Path(str(settings["command"][-1])).stem
    weights = dict.fromkeys(path for key, path in _weights(settings) if key != "base")
    kind = settings["kind"].rpartition(":")[2].removesuffix("Config")
    return ", ".join(weights) or str(settings.get("engine", kind))


def _weights(settings: Any) -> Iterator[tuple[str, str]]:
    """Key and value of every setting that names weights, on whatever level."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key in WEIGHTS and isinstance(value, str):
                yield key, value
            else:
                yield from _weights(value)
