"""`stage bench gpu`: whether a GPU computes what it should, and how fast, in one command.

Each part is a list of checks, which are benchmarks of their own; one that fails is recorded with
its reason, and the others go on.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from stage_rl.bench.base import BenchResult
from stage_rl.bench.gpu.checks import Checks, Sizes
from stage_rl.bench.gpu.correctness import correctness
from stage_rl.bench.gpu.drawing import drawing
from stage_rl.bench.gpu.learning import step_7b, train_1b
from stage_rl.bench.record import FOLDER, record_of
from stage_rl.distributed import release_unused
from stage_rl.errors import InputError
from stage_rl.files import replace_text
from stage_rl.policies.loading import one_line

BAR = "every check holds (one GPU)"
PARTS: Mapping[str, Callable[[Sizes], Checks]] = {
    "correctness": correctness,
    "rollout": drawing,
    "train-1b": train_1b,
    "step-7b": step_7b,
}


def run(
    *,
    part: Literal["all", "correctness", "rollout", "train-1b", "step-7b"] = "all",
    folder: str = FOLDER,
) -> BenchResult:
    """Runs the checks of a part, or of all, and writes a record of each part into `folder` after
    each of its checks: gpu-PART.json, for `stage bench show`.

    The models have the published sizes and random weights, drawn on the GPU.
    """
    if not torch.cuda.is_available():
        raise InputError("bench gpu: no GPU is visible here; run it on a machine with one")
    Path(folder).mkdir(parents=True, exist_ok=True)
    chosen = PARTS if part == "all" else {part: PARTS[part]}
    results = {}
    for name, checks in chosen.items():

        def keep(result: BenchResult, part: str = name) -> None:
            record = record_of("gpu", BAR, {"part": part}, result)
            replace_text(Path(folder) / f"gpu-{part}.json", json.dumps(record, indent=2) + "\n")

        results[name] = run_checks(checks(Sizes()), keep)
    return combined(results)


def run_checks(
    checks: Checks, keep: Callable[[BenchResult], None] = lambda result: None
) -> BenchResult:
    """All checks of a part, one after the other, as one result; measures are CHECK_NAME.

    `keep` gets the result so far after each. What a check raises is its result, and its traceback
    is printed: compilers of kernels, torch and drivers have errors of their own.
    """
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
        except Exception as error:
            traceback.print_exc()
            failure = f"failed: {type(error).__name__}: {one_line(error)}"
            results[name] = BenchResult(failure, False, {})
        keep(combined(results))
        with suppress(RuntimeError):  # after an illegal access everything on the GPU fails
            release_unused()
    return combined(results)


def combined(results: Mapping[str, BenchResult]) -> BenchResult:
    """Several results as one, which reaches its bar where none of them misses its own."""
    missed = [name for name, result in results.items() if result.reached is False]
    lines: list[str] = []
    measures: dict[str, float] = {}
    words = {True: "holds", False: "MISSED", None: "no bar"}
    for name, result in results.items():
        lines += [*result.table, f"{name}: {result.headline}; {words[result.reached]}", ""]
        measures |= {f"{name}_{key}": value for key, value in result.measures.items()}
    headline = f"{len(results) - len(missed)} of {len(results)} hold"
    headline += f", not: {', '.join(missed)}" if missed else ""
    return BenchResult(headline, not missed, measures, tuple(lines[:-1]))
