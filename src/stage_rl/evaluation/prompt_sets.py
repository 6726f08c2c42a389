"""The prompts of the published benchmarks, by what the user has of them on disk."""

from __future__ import annotations

from pathlib import Path

from stage_rl.errors import InputError
from stage_rl.evaluation.images import numbered
from stage_rl.evaluation.smoke import smoke_prompts
from stage_rl.prompts import (
    as_prompts,
    geneval_prompts,
    load_drawbench,
    load_hps,
    load_ocr,
    load_t2i_compbench,
)
from stage_rl.prompts.t2i_compbench import NOUN_LIST
from stage_rl.types import Prompt

INDEX_STRIDE = 100_000
"""Index of the first prompt of the second set, and so on: sets share no random stream."""
WHERE = {
    "geneval": "",
    "t2i_compbench": "t2i_compbench",
    "hps": "hps",
    "drawbench": "drawbench/prompts.csv",
    "ocr": "ocr/test.txt",
}
"""Where the files of a set are below the folder of prompt sets; GenEval's are built."""
LOADERS = {
    "t2i_compbench": load_t2i_compbench,
    "hps": load_hps,
    "drawbench": load_drawbench,
    "ocr": load_ocr,
}


def prompts_of(prompt_set: str, data: Path | None, *, smoke: bool = False) -> tuple[Prompt, ...]:
    """The prompts of a set, with indices of their own; what is missing is an `InputError`."""
    if smoke:
        prompts = smoke_prompts(prompt_set)
    elif prompt_set == "geneval":
        prompts = as_prompts(geneval_prompts())
    else:
        prompts = LOADERS[prompt_set](_find(prompt_set, data))
    return numbered(prompts, list(WHERE).index(prompt_set) * INDEX_STRIDE)


def is_there(prompt_set: str, data: Path | None) -> bool:
    """Whether the files of a set can be found."""
    return prompt_set == "geneval" or _candidate(prompt_set, data) is not None


def _find(prompt_set: str, data: Path | None) -> Path:
    found = _candidate(prompt_set, data)
    if found is None:
        given = f"{data}: has no {WHERE[prompt_set]}" if data else "is not given"
        raise InputError(
            f"--data {given}; write the folder with {WHERE[prompt_set]}, or the set itself"
        )
    return found


def _candidate(prompt_set: str, data: Path | None) -> Path | None:
    """Below the folder of all sets, or the given path itself."""
    if data is None:
        return None
    below = data / WHERE[prompt_set]
    if below.exists():
        return below
    is_set = {
        "t2i_compbench": (data / NOUN_LIST).exists(),
        "hps": (data / "anime.json").exists() or data.suffix == ".json",
        "drawbench": data.suffix == ".csv",
        "ocr": (data.is_file() and data.suffix != ".csv") or data.name == "length_buckets.csv",
    }
    return data if data.exists() and is_set[prompt_set] else None
