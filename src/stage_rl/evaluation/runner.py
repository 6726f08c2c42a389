"""Benchmarks by name: one model, or a trained one against its base."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from stage_rl.errors import InputError
from stage_rl.evaluation import shapes_geneval
from stage_rl.evaluation.benchmark import Comparison, Results, Setup, compare
from stage_rl.evaluation.progress import progress
from stage_rl.evaluation.run_suites import Request, run_suites, skipped
from stage_rl.evaluation.scorers import parse_overrides
from stage_rl.evaluation.suites import SUITES
from stage_rl.pictures import side_by_side
from stage_rl.policies.base import Policy
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling
from stage_rl.schema import EvaluationConfig
from stage_rl.settings import near_or_all
from stage_rl.training.distributed import joined_ranks, launched
from stage_rl.training.runs import replace_file, replace_text
from stage_rl.types import Prompt, Rollout

__all__ = [
    "Comparison",
    "Request",
    "Results",
    "compare",
    "compare_suites",
    "evaluate",
    "evaluate_against",
    "evaluate_run",
    "evaluate_suites",
    "evaluation_prompts",
    "launched",
    "parse_overrides",
    "skipped",
]

BENCHMARKS = {shapes_geneval.NAME: shapes_geneval}
IMAGES_IN_GRID = 4
"""Images of each prompt and policy in the before/after grid."""


def evaluate(
    model: str | Path | Policy,
    benchmark: str = shapes_geneval.NAME,
    *,
    images_per_task: int = 400,
    guidance_scale: float | None = None,
    seed: int = 0,
    dtype: str = "mixed",
    device: str | torch.device | None = None,
) -> Results:
    """Scores a model on a benchmark; image k of a prompt has the same stream for every model.

    `model` is a folder, a hub id, `shapes`, a run folder or RUN@STEP, or a policy. `guidance_scale`
    None is the benchmark's own; `device` None is the GPU where there is one. `images_per_task` is
    for shapes-geneval; the published benchmarks say themselves how many images they need, and
    `evaluate_suites` takes what they can be told. Wrong input is an `InputError`.
    """
    if benchmark in SUITES:
        request = Request(guidance_scale=guidance_scale, seed=seed, dtype=dtype)
        return evaluate_suites(model, [benchmark], request, device=device)[0]
    setup = _setup(benchmark, images_per_task, guidance_scale, seed=seed, dtype=dtype)
    return _run(_load(model, device), setup, name=_name(model))


def evaluate_suites(
    model: str | Path | Policy | None,
    benchmarks: Sequence[str],
    request: Request,
    *,
    device: str | torch.device | None = None,
) -> list[Results]:
    """Scores a model, or with None the images of `request.images`, on published benchmarks.

    Under `torchrun` every process takes its share of the prompts, and all get all results.
    """
    best = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load = None if model is None else functools.partial(_load, model, best)
    name = str(request.images) if model is None else _name(model)
    with joined_ranks(best) as ranks:
        return run_suites(load, benchmarks, request, model=name, ranks=ranks)


def compare_suites(
    model: str | Path | Policy,
    base: str | Path | Policy,
    benchmarks: Sequence[str],
    request: Request,
) -> list[Comparison]:
    """Scores a model and its base by `evaluate_suites`, for paired differences.

    A folder that is asked for holds both, under `model` and `base`.
    """
    results = [
        evaluate_suites(one, benchmarks, replace(request, out=request.out and request.out / part))
        for one, part in ((base, "base"), (model, "model"))
    ]
    return [compare(*pair) for pair in zip(*results, strict=True)]


def evaluate_against(
    model: str | Path | Policy,
    base: str | Path | Policy,
    benchmark: str = shapes_geneval.NAME,
    *,
    images_per_task: int = 400,
    guidance_scale: float | None = None,
    seed: int = 0,
    dtype: str = "mixed",
) -> Comparison:
    """Scores a model and its base on the same streams, for paired differences; see `evaluate`."""
    if benchmark in SUITES:
        request = Request(guidance_scale=guidance_scale, seed=seed, dtype=dtype)
        return compare_suites(model, base, [benchmark], request)[0]
    setup = _setup(benchmark, images_per_task, guidance_scale, seed=seed, dtype=dtype)
    # Both first: a wrong name is answered before the long work.
    policies = [_load(one, None) for one in (base, model)]
    results = [
        _run(policy, setup, name=_name(one))
        for policy, one in zip(policies, (base, model), strict=True)
    ]
    return compare(*results)


def evaluate_run(
    before: Policy,
    after: Policy,
    *,
    evaluation: EvaluationConfig,
    guidance_scale: float,
    out: Path,
) -> str:
    """Judges a run's policy before and after on the same streams; the printed comparison.

    Writes evaluation.json and before_after.png to `out`. `guidance_scale` is that of the rollout,
    for an evaluation that names none.
    """
    own = evaluation.guidance_scale
    setup = _setup(
        evaluation.benchmark,
        evaluation.images_per_task,
        guidance_scale if own is None else own,
        seed=evaluation.seed,
    )
    base, trained = _run(before, setup, name="base"), _run(after, setup, name="trained")
    comparison = compare(base, trained)
    replace_text(out / "evaluation.json", json.dumps(comparison.to_json(), allow_nan=False))
    drawn = [_examples(policy, setup) for policy in (before, after)]
    grid = side_by_side(
        *(one.images_NHWC for one in drawn),
        columns=IMAGES_IN_GRID,
        titles=[prompt.text for prompt in drawn[0].prompts],
        heads=("base", "trained"),
    )
    replace_file(out / "before_after.png", grid.save)
    return comparison.table()


def evaluation_prompts(benchmark: str) -> tuple[Prompt, ...]:
    """All prompts of a benchmark that a run may be compared on."""
    return tuple(p for prompts in BENCHMARKS[benchmark].prompt_sets().values() for p in prompts)


def _load(model: str | Path | Policy, device: str | torch.device | None) -> Policy:
    if not isinstance(model, str | Path):
        return model
    from stage_rl.training.models import load_policy

    best = "cuda" if torch.cuda.is_available() else "cpu"
    return load_policy(str(model), torch.device(best if device is None else device))


def _name(model: str | Path | Policy) -> str:
    return str(model) if isinstance(model, str | Path) else "policy"


def _setup(
    benchmark: str,
    images_per_task: int,
    guidance_scale: float | None,
    *,
    seed: int,
    dtype: str = "mixed",
) -> Setup:
    if benchmark not in BENCHMARKS:
        hint = near_or_all(benchmark, [*BENCHMARKS, *SUITES])
        raise InputError(f"benchmark: unknown '{benchmark}'; {hint}")
    for name, value, least in (("images_per_task", images_per_task, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: {value} is out of range; write at least {least}")
    scale = BENCHMARKS[benchmark].GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    return Setup(benchmark, images_per_task, scale, seed, dtype)


def _run(policy: Policy, setup: Setup, *, name: str) -> Results:
    benchmark = BENCHMARKS[setup.benchmark]
    with progress(f"evaluate {name}", benchmark.num_images(setup.images_per_task)) as advance:
        return benchmark.run(policy, setup, name=name, advance=advance)


def _examples(policy: Policy, setup: Setup) -> Rollout:
    """The first images of some prompts, as the benchmark draws them."""
    return rollout(
        Engine(policy, dtype=setup.dtype),
        BENCHMARKS[setup.benchmark].example_prompts(),
        group_size=IMAGES_IN_GRID,
        sampling=Sampling(guidance_scale=setup.guidance_scale),
        seed=setup.seed,
        step=0,
    )
