"""The verbs of the package: train a recipe; load, sample, evaluate or export a model.

A model is a folder of weights, a hub id, `shapes` (the weights that come with the package), a run
RUN (its newest checkpoint), RUN@STEP or RUN@best (its best one by held-out validation). Where a
verb draws, it may be a `Policy` as well.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from stage_rl.config import load_recipe, load_reward
from stage_rl.console import on_stop_signal
from stage_rl.distributed import concat, init_distributed, pick_device
from stage_rl.errors import InputError, RewardError, Stopped
from stage_rl.evaluation.folder import FOLDER, check_writable
from stage_rl.evaluation.request import Request, asked_of, evaluation_of
from stage_rl.evaluation.results import Comparison, Results
from stage_rl.evaluation.run import IMAGES_AT_ONCE, compare_policies, run_suites
from stage_rl.evaluation.understanding import (
    Answers,
    UnderstandingReport,
    answer_all,
    check_pictures,
    find_understanding,
)
from stage_rl.files import replace_text
from stage_rl.policies.base import Policy, PolicyConfig, resolve_guidance
from stage_rl.policies.digest import base_digest
from stage_rl.policies.loading import policy_config
from stage_rl.recipe import Recipe
from stage_rl.rewards.base import RewardConfig, Score
from stage_rl.rewards.judge import ask, build_reward
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling, check_seed
from stage_rl.training import export as exporting
from stage_rl.training import loop
from stage_rl.training.checkpoint import (
    Checkpoint,
    checkpoints,
    latest_checkpoint,
    read_checkpoint,
    step_of,
)
from stage_rl.training.trackers import OnStep
from stage_rl.types import Prompt, Rollout

__all__ = [
    "evaluate",
    "evaluate_against",
    "evaluate_all",
    "evaluate_understanding",
    "export",
    "load",
    "sample",
    "score",
    "train",
]

Model = str | Path | Policy

MAX_IMAGES = 10_000
"""Of one call of `sample`, which holds all of them in memory: at 384 x 384 pixels 4.4 GB."""


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    on_step: OnStep | None = None,
) -> Path:
    """Trains a recipe, or goes on with its run, and returns the run folder, which is a model.

    `recipe`: one that was loaded, or what `load_recipe` takes, with its overrides: a name, a file,
    a run. `on_step(step, metrics)` is called after each step. Raises as `training.loop.train` does.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise InputError("overrides: the recipe is loaded already; write them in load_recipe")
    return loop.train(recipe, on_step=on_step)


def score(
    images: Rollout | Sequence[Image.Image],
    prompts: str | Sequence[str | Prompt] = (),
    *,
    reward: RewardConfig | str,
    settings: Sequence[str] = (),
    device: str | torch.device | None = None,
) -> list[Score]:
    """What a reward says of images: those of a rollout, or as many as there are prompts.

    `reward`: its settings, or its name with `settings` of the form dotted.key=value. Raises
    RewardError where it gives no usable score; wrong input is an `InputError`.
    """
    config = load_reward(reward, settings) if isinstance(reward, str) else reward
    if isinstance(images, Rollout):
        asked = [one for one in images.prompts for _ in range(images.group_size)]
        images_NHWC = images.images_NHWC
    else:
        asked = _numbered(prompts)
        if len(asked) != len(images):
            raise InputError(f"prompts: {len(asked)} for {len(images)} images; write one for each")
        pixels = [np.asarray(image.convert("RGB")) for image in images]
        if len({one.shape for one in pixels}) > 1:
            raise InputError("images: are of several sizes; score each size by itself")
        images_NHWC = torch.from_numpy(np.stack(pixels))
    for prompt in asked:
        if reason := config.unsupported_reason(prompt):
            raise InputError(f"reward '{config.name}' {reason} ('{prompt.text[:40]}')")
    scores = ask(build_reward(config, pick_device(device)), images_NHWC, asked)
    if isinstance(scores, str):
        raise RewardError(f"reward '{config.name}': {scores}")
    return scores


def load(model: Model, device: str | torch.device | None = None) -> Policy:
    """The policy behind a model. `device`: None is the GPU where there is one.

    A policy is taken as it is, on the device it is on. Wrong input is an `InputError`.
    """
    if isinstance(model, str | Path):
        return find_source(str(model)).load(pick_device(device))
    if device is not None and torch.device(device).type != model.device.type:
        raise InputError(f"device: the policy is on {model.device}; leave device out, or move it")
    return model


def sample(
    model: Model,
    prompts: str | Sequence[str | Prompt],
    *,
    images_per_prompt: int = 1,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    advance: Callable[[int], object] | None = None,
) -> Rollout:
    """Images of prompts, group by group: row i * images_per_prompt + k is image k of prompt i.

    `guidance_scale` and `top_k` None are those of the model's family. Temperature 0 draws the
    likeliest token, `top_k` 0 from all. Image k of a prompt is the same in any batch. `device`:
    None is the GPU where there is one; `dtype`: `float32`, or `mixed` for bf16 linear layers (None:
    on a GPU). `advance` is told how many more images are there. Wrong input is an `InputError`.
    """
    # Wrong numbers are refused before a model is loaded.
    sampling = Sampling(1.0 if guidance_scale is None else guidance_scale, temperature, top_k or 0)
    for name, value, minimum in (("images_per_prompt", images_per_prompt, 1), ("seed", seed, 0)):
        if value < minimum:
            raise InputError(f"{name}: {value} is out of range; write at least {minimum}")
    check_seed(seed)
    numbered = _numbered(prompts)
    total = images_per_prompt * len(numbered)
    if total > MAX_IMAGES:
        raise InputError(
            f"images_per_prompt: {images_per_prompt} of {len(numbered)} prompts are {total} "
            f"images; draw at most {MAX_IMAGES} at a time"
        )
    policy = load(model, device)
    sampling = replace(
        sampling,
        guidance_scale=resolve_guidance(policy, guidance_scale),
        top_k=policy.default_top_k if top_k is None else top_k,
    )
    engine = Engine(policy, dtype=dtype or ("mixed" if policy.device.type == "cuda" else "float32"))
    draw = functools.partial(rollout, group_size=images_per_prompt, sampling=sampling, seed=seed)
    at_once = max(1, IMAGES_AT_ONCE // images_per_prompt) if advance else len(numbered)
    parts = []
    for first in range(0, len(numbered), at_once):
        parts.append(draw(engine, numbered[first : first + at_once], step=0))
        if advance:
            advance(len(parts[-1].images_NHWC))
    return concat(parts)


def _numbered(prompts: str | Sequence[str | Prompt]) -> list[Prompt]:
    """Texts as prompts, numbered by their place; prompts keep their own index."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("prompts: there are none; write at least one")
    for prompt in listed:
        if not isinstance(prompt, str | Prompt):
            raise InputError(f"prompts: {prompt!r} is not a text; write texts or Prompt objects")
    return [Prompt(p, index) if isinstance(p, str) else p for index, p in enumerate(listed)]


def evaluate(
    model: Model,
    benchmark: str = "shapes-geneval",
    *,
    device: str | torch.device | None = None,
    **options: Any,
) -> Results:
    """Scores a model on a benchmark; image k of a prompt has the same stream for every model.

    The options are the fields of `Request`. What is drawn and scored is kept in the folder `out`,
    and a later call takes it up. Wrong input is an `InputError`.
    """
    for name in ("out", "data", "images"):
        if isinstance(options.get(name), str):
            options[name] = Path(options[name])
    return evaluate_all(model, [benchmark], Request(**options), device=device)[0]


def evaluate_all(
    model: Model | None,
    benchmarks: Sequence[str],
    request: Request | None = None,
    *,
    device: str | torch.device | None = None,
) -> list[Results]:
    """Scores a model, or with None the images of `request.images`, on benchmarks.

    Under `torchrun` every process takes its share of the prompts, and all get all results.
    """
    request = request or Request()
    name = str(request.images) if model is None else "policy"
    if isinstance(model, str | Path):
        name, device = str(model), pick_device(device)
    with init_distributed(pick_device(device)) as world:
        load_it = None if model is None else functools.partial(load, model, device)
        return run_suites(load_it, benchmarks, request, model=name, world=world)


def evaluate_against(
    model: Model, base: Model, benchmarks: Sequence[str], request: Request | None = None
) -> list[Comparison]:
    """Scores a model and its base by `evaluate_all`, for paired differences.

    A folder that is asked for holds both, under `model` and `base`.
    """
    request = request or Request()
    before, after = (
        evaluate_all(one, benchmarks, replace(request, out=request.out and request.out / part))
        for one, part in ((base, "base"), (model, "model"))
    )
    return [Comparison(*pair) for pair in zip(before, after, strict=True)]


def evaluate_understanding(
    model: Model, benchmark: str, request: Request | None = None, *, against: Model | None = None
) -> UnderstandingReport:
    """Asks a model, and its base where one is given, questions about images (pope or mmbench).

    `request.images_per_task` is the number of questions of each set; answers are kept in
    `request.out`, or evaluations/understanding.
    """
    request = request or Request()
    published = find_understanding(benchmark).published
    out = request.out or FOLDER / "understanding"
    check_pictures(benchmark, request.data, request.images_per_task)  # no model is loaded for less
    if not any(out.glob(f"{benchmark}-*.json")):  # answers that are there may only be read
        check_writable(out)

    def answers(asked: Model) -> Answers:
        return answer_all(
            load(asked),
            benchmark,
            model=str(asked) if isinstance(asked, str | Path) else "policy",
            data=request.data,
            out=out,
            limit=request.images_per_task,
            mixed=request.dtype == "mixed",
        )

    base = None if against is None else answers(against)
    return UnderstandingReport(answers(model), published, base)


def evaluate_run(recipe: Recipe, folder: Path) -> str:
    """The comparison of a run's base and trained policy; made once for every number of steps and
    way to evaluate.

    Raises `Stopped` after Ctrl-C or SIGTERM.
    """
    saved, kept = latest_checkpoint(folder / "checkpoints"), folder / "evaluation.txt"
    evaluation = evaluation_of(recipe)
    assert evaluation is not None
    assert saved is not None
    # The run may have more steps than this recipe asks for.
    head = f"after {saved.state.step} steps; "
    asked = asked_of(evaluation)
    before = _asked_before(folder, asked, top_k=recipe.policy.policy_class.default_top_k)
    if kept.exists() and before == asked:
        text = kept.read_text(encoding="utf-8")
        if text.startswith(head):
            return text
    device = pick_device(recipe.training.device, key="training.device")

    def stop(number: int) -> None:
        message = "stopped during the evaluation; run the same command again to evaluate"
        raise Stopped(message, signal_number=number)

    with on_stop_signal(stop):
        table = compare_policies(
            recipe.policy.build(device),
            load(folder, device),
            evaluation=evaluation,
            out=folder,
        )
    text = f"{head}{table}\nimages: {folder / 'before_after.png'}"
    replace_text(kept, text)
    return text


def _asked_before(folder: Path, asked: Mapping[str, Any], *, top_k: int) -> Mapping[str, Any]:
    """What the comparison in a run folder was asked for. Those of former versions do not say, or
    not from how many tokens they drew: as their family does, `top_k`.
    """
    file = folder / "evaluation.json"
    if not file.exists():
        return asked
    before = json.loads(file.read_text(encoding="utf-8")).get("asked")
    return asked if before is None else {"top_k": top_k, **before}


def export(
    model: str | Path,
    out: str | Path,
    *,
    layout: str | None = None,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """Writes a model to a new folder `out`, which is there whole or not at all.

    Where its run trained an adapter, `out` holds the adapter alone, for PEFT, unless `merge` adds
    it to the weights. `layout` is one of the family's, None the first; `dtype` that of the tensors,
    None the one they are held in. A run's `out` has a model card, README.md.
    """
    source, out = find_source(str(model)), Path(out)
    exporting.check_free(out)
    return exporting.export(
        source.load(torch.device("cpu")),
        out,
        base=getattr(source.policy, "path", ""),
        run=source.run,
        step=source.checkpoint.state.step if source.checkpoint else 0,
        layout=layout,
        merge=merge,
        dtype=dtype,
    )


@dataclass(frozen=True)
class Source:
    """What the name of a model stands for: settings of a policy, and of a run its checkpoint."""

    policy: PolicyConfig
    run: Path | None = None
    checkpoint: Checkpoint | None = None

    def load(self, device: torch.device) -> Policy:
        """The policy with the weights of the checkpoint."""
        policy = self.policy.build(device)
        if self.checkpoint is not None:
            self.checkpoint.check_base(base_digest(policy, like=self.checkpoint.state.base))
            self.checkpoint.load_policy(policy.module)
        return policy


def find_source(name: str) -> Source:
    """Finds what the name of a model stands for, and loads no weights."""
    run, step = Path(name), ""
    if "@" in name and not run.exists():  # a folder's name may hold an @ of its own
        folder, _, step = name.rpartition("@")
        run = Path(folder)
    if (run / "recipe.json").exists():
        policy = load_recipe(run / "recipe.json").policy
        return Source(policy, run, _find_checkpoint(name, run / "checkpoints", step))
    if step and run.is_dir():
        raise InputError(f"{name}: {run} is not a run folder; write the folder without @{step}")
    return Source(policy_config(name))


def _find_checkpoint(name: str, root: Path, step: str) -> Checkpoint:
    """The checkpoint of a step, of the `best` one, or the newest where `step` is empty."""
    if step in ("", "best"):
        newest = latest_checkpoint(root)
        if not step and newest is not None:
            return newest
        if not step:
            raise InputError(f"{name}: has no checkpoint yet; train it first")
        if newest is None or newest.state.best_step is None:
            raise InputError(
                f"{name}: no held-out validation has chosen a best checkpoint; train with "
                "evaluation.every, or write RUN@STEP"
            )
        step = str(newest.state.best_step)
    folders = {str(step_of(folder)): folder for folder in reversed(checkpoints(root))}
    if step not in folders:
        known = ", ".join(folders) or "none"
        raise InputError(f"{name}: no checkpoint of step {step}; the run has: {known}")
    return read_checkpoint(folders[step])
