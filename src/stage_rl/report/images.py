"""Figures of images: similarity maps, temperatures, and models side by side on the same streams.

Shape suffixes: P prompts, G images of a prompt, N = P x G, T image tokens, C codebook channels,
H x W pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from stage_rl import api
from stage_rl.algorithm import group_advantages, opposing_similarity
from stage_rl.config import load_recipe
from stage_rl.distributed import pick_device
from stage_rl.errors import InputError
from stage_rl.evaluation.request import Request
from stage_rl.evaluation.results import OVERALL, group_diversity
from stage_rl.evaluation.run import run_suite
from stage_rl.evaluation.suites import Suite, find_suite
from stage_rl.policies.base import Policy, resolve_guidance
from stage_rl.recipe import Recipe
from stage_rl.report.figures import COLOUR_MAP, COLOURS, Drawing
from stage_rl.rollout.engine import Engine
from stage_rl.rollout.sample import rollout
from stage_rl.rollout.sampling import Sampling, check_seed
from stage_rl.types import Prompt, Rollout

TILE_IN = 0.75
"""Side of an image."""
TEXT_IN = 0.9
"""Width of a prompt beside its images."""
MAX_SHOWN = 8
"""Images of a group."""


def similarity(run: Path, *, step: int | None = None, group: int | None = None) -> Drawing:
    """Where the images of a group are alike: the cosine of codebook vectors, position by position,
    of each with the best one, and with all that have the opposite sign of advantage (equation 6).

    `step`: one whose samples the run kept; None: the last. `group`: of that step, from 0; None: the
    one whose rewards differ most.
    """
    step, arrays = _samples(run, step)
    rewards_PG = arrays["rewards"]
    if group is None:
        # One on which a reward failed has no spread, and comes behind all others.
        spread_P = rewards_PG.std(1)
        group = int(np.where(np.isnan(spread_P), -1.0, spread_P).argmax())
    if not 0 <= group < len(rewards_PG):
        known = f"step {step} kept {len(rewards_PG)}; write 0 to {len(rewards_PG) - 1}"
        raise InputError(f"--group {group}: {known}")
    if np.isnan(rewards_PG[group]).any():
        raise InputError(f"--group {group}: a reward failed on it in step {step}; name another")
    # Image tokens mean the same in every checkpoint: the tokenizer is not trained.
    policy = load_recipe(run / "recipe.json").policy.build(pick_device(None))
    tokens_GT = torch.from_numpy(arrays["tokens"][group]).to(policy.device)
    prompt, reward_G = str(arrays["prompts"][group]), torch.from_numpy(rewards_PG[group])
    codes_GTC = policy.codes(tokens_GT).float().cpu()
    best_first = reward_G.argsort(descending=True, stable=True)
    places = np.linspace(0, len(best_first) - 1, min(len(best_first), MAX_SHOWN)).round()
    shown = best_first[torch.from_numpy(places).long()]
    pair_GT = torch.cosine_similarity(codes_GTC, codes_GTC[shown[0]], dim=-1)
    if "similarity" in arrays:
        group_GT = torch.from_numpy(arrays["similarity"][group])
    else:  # the run weighed nothing by it
        advantages_1G = group_advantages(reward_G[None])
        group_GT = opposing_similarity(codes_GTC[None], advantages_1G)[0]
    images_NHWC = policy.images([Prompt(prompt)] * len(shown), tokens_GT[shown]).numpy()
    grid = policy.layout.grid
    maps = {
        name: values_GT[shown].unflatten(1, grid).tolist()
        for name, values_GT in (("pair", pair_GT), ("group", group_GT))
    }
    rewards = reward_G[shown].tolist()
    figure = _similarity_figure(images_NHWC, rewards, maps)
    figure.suptitle(f"{prompt}, step {step}", fontsize=7)
    about = {"prompt": prompt, "step": step, "group": group, "images": shown.tolist()}
    return Drawing(figure, {**about, "rewards": rewards, "similarity": maps})


def temperature(
    model: str,
    *,
    benchmark: str = "shapes-geneval",
    temperatures: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    num_shown: int = 4,
    **options: Any,
) -> Drawing:
    """Images, entropy and score of a model against the temperature of sampling.

    `options` are the fields of `Request`. Entropies are means over four images of the first prompt
    of each task: of the distribution that is sampled from, and of the conditional one at
    temperature 1 on the same images. The first images of `num_shown` prompts are shown.
    """
    suite, request = find_suite(benchmark), Request(**options)
    prompts, measure = _first_prompts(suite, request.data), suite.by_task[0]
    requests = [replace(request, temperature=temperature) for temperature in temperatures]
    policy = api.load(model)
    engine = Engine(policy, dtype=request.dtype)
    columns = ["temperature", measure, "standard_error", "entropy_sampled", "entropy_conditional"]
    rows, images = [], []
    for asked in requests:
        sampling = asked.sampling(suite, policy)
        results = run_suite(policy, benchmark, asked, model=model, engine=engine)
        overall = results.summary(measure)[OVERALL]
        drawn = rollout(engine, prompts, group_size=4, sampling=sampling, seed=asked.seed, step=0)
        assert drawn.entropy_NT is not None
        entropies = _sampled_entropy(policy, drawn, sampling), drawn.entropy_NT.mean().item()
        error = overall.standard_error or 0.0
        rows.append([asked.temperature, overall.mean, error, *entropies])
        images.append(drawn.images_NHWC[:: drawn.group_size][:num_shown].numpy())
    texts = [prompt.text for prompt in prompts[:num_shown]]
    return Drawing(_temperature_figure(rows, images, texts, measure), [columns, *rows])


def before_after(run: str, **options: Any) -> Drawing:
    """The base of a run to the left, the run (RUN, RUN@STEP or RUN@best) to the right, on the same
    prompts and streams. `options`: as for `side_by_side`.
    """
    source = api.find_source(run)
    if source.run is None:
        raise InputError(f"{run}: is not a run, so it has no base; name a run")
    base = replace(source, checkpoint=None)
    return side_by_side({"base": base, "trained": source}, **options)


def diversity(models: Sequence[str], *, labels: Sequence[str] = (), **options: Any) -> Drawing:
    """Models beside each other on the same prompts and streams, each with how much its images of a
    prompt differ. `labels`: other names for them; `options`: as for `side_by_side`.
    """
    if labels and len(labels) != len(models):
        raise InputError(f"--label: {len(labels)} for {len(models)} models; write one for each")
    names = labels or [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(names)}: are alike; write a --label for each")
    sources = {name: api.find_source(model) for name, model in zip(names, models, strict=True)}
    return side_by_side(sources, **options)


def side_by_side(
    sources: Mapping[str, api.Source],
    *,
    prompts: Sequence[str] = (),
    num_images: int = 4,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Drawing:
    """A row for each prompt, a column of images for each model; under them their diversity, 1 - the
    mean cosine of codebook vectors over pairs of images and positions.

    Prompts and guidance that are not given are those of the first run among the models: of its
    evaluation the first prompt of each task, else the first it trains on.
    """
    check_seed(seed)
    run = next((source.run for source in sources.values() if source.run), None)
    recipe = load_recipe(run / "recipe.json") if run else None
    asked = [Prompt(text, index) for index, text in enumerate(prompts)] or _prompts_of(recipe)
    total = num_images * len(asked)
    if total > api.MAX_IMAGES:
        raise InputError(
            f"images: {num_images} of {len(asked)} prompts are {total}; draw at most "
            f"{api.MAX_IMAGES} of each model"
        )
    if guidance_scale is None:
        policy_class = next(iter(sources.values())).policy.policy_class
        own = recipe.guidance_scale if recipe else None
        guidance_scale = resolve_guidance(policy_class, own)
    sampling = Sampling(guidance_scale=guidance_scale, temperature=temperature)
    dtype = recipe.rollout.dtype if recipe else "float32"
    how = {"group_size": num_images, "sampling": sampling, "seed": seed, "step": 0}
    drawn = {name: _draw(source, asked, dtype, **how) for name, source in sources.items()}
    images = {name: images_PGHWC for name, (images_PGHWC, _, _) in drawn.items()}
    tokens = {name: tokens_PGT for name, (_, tokens_PGT, _) in drawn.items()}
    spread = {name: spread_P for name, (_, _, spread_P) in drawn.items()}
    texts = [prompt.text for prompt in asked]
    about = {"guidance_scale": guidance_scale, "temperature": temperature, "seed": seed}
    data = {"prompts": texts, **about, "diversity": spread, "tokens": tokens}
    return Drawing(_models_figure(texts, images, spread), data)


def _draw(
    source: api.Source, prompts: Sequence[Prompt], dtype: str, **how: Any
) -> tuple[np.ndarray, list[Any], list[float | None]]:
    """images_PGHWC, tokens_PGT and the diversity of each prompt; the model is gone afterwards."""
    policy = source.load(pick_device(None))
    drawn = rollout(Engine(policy, dtype=dtype), prompts, **how)
    tokens_PGT = drawn.tokens_NT.unflatten(0, (len(prompts), -1))
    images_PGHWC = drawn.images_NHWC.unflatten(0, (len(prompts), -1)).numpy()
    spread = [_spread(policy.codes(tokens_GT).cpu()) for tokens_GT in tokens_PGT]
    return images_PGHWC, tokens_PGT.tolist(), spread


def _prompts_of(recipe: Recipe | None) -> list[Prompt]:
    if recipe is None:
        raise InputError("--prompt: is missing, and no model is a run with prompts; write one")
    if recipe.evaluation is None:
        return list(recipe.prompts.build()[:MAX_SHOWN])
    evaluation = recipe.evaluation
    return _first_prompts(find_suite(evaluation.benchmark), evaluation.data_folder)


def _first_prompts(suite: Suite, data: Path | None) -> list[Prompt]:
    """The first prompt of each task of a benchmark."""
    by_task: dict[str, Prompt] = {}
    for prompt in suite.prompt_set.prompts(data):
        by_task.setdefault(suite.task_of(prompt), prompt)
    return list(by_task.values())


def _samples(run: Path, step: int | None) -> tuple[int, dict[str, np.ndarray]]:
    """A step whose samples a run kept, and their arrays."""
    files = {int(file.stem): file for file in sorted((run / "samples").glob("*.npz"))}
    if not files:
        raise InputError(f"{run}: holds no samples; train with run.log_images_every above 0")
    step = max(files) if step is None else step
    if step not in files:
        known = ", ".join(map(str, files))
        raise InputError(f"--step {step}: the run kept no samples of it; write one of: {known}")
    with np.load(files[step]) as arrays:
        return step, dict(arrays)


@torch.no_grad()
def _sampled_entropy(policy: Policy, drawn: Rollout, sampling: Sampling) -> float:
    """Mean entropy (nats) of the distributions that a rollout was drawn from."""
    if sampling.temperature == 0:
        return 0.0
    entropies = [
        policy([prompt], tokens_GT, group_size=drawn.group_size, scoring=sampling.scoring("guided"))
        for prompt, tokens_GT in zip(
            drawn.prompts, drawn.tokens_NT.split(drawn.group_size), strict=True
        )
    ]
    return torch.cat([entropy_GT for _, entropy_GT in entropies]).mean().item()


def _spread(codes_GTC: Tensor) -> float | None:
    """The diversity of a prompt's images; None of a single one."""
    nowhere_GT = torch.zeros(codes_GTC.shape[:2], dtype=torch.bool)
    return group_diversity(codes_GTC, nowhere_GT).get("background")


def _similarity_figure(
    images_NHWC: np.ndarray, rewards: Sequence[float], maps: Mapping[str, Any]
) -> Figure:
    """Columns are images, best first; rows the images, the cosine with the first, the mean cosine
    with those of opposite advantage.
    """
    count, (height, width) = len(images_NHWC), images_NHWC.shape[1:3]
    scale = Normalize(min(0.0, np.min(maps["pair"]), np.min(maps["group"])), 1.0)
    figure = Figure(figsize=(TILE_IN * count + TEXT_IN + 0.6, TILE_IN * 3 + 0.4))
    axes = figure.subplots(3, count, squeeze=False)
    for ax, image_HWC, reward in zip(axes[0], images_NHWC, rewards, strict=True):
        _show(ax, image_HWC)
        ax.set_title(f"reward {reward:.2f}")
    for in_row, name in zip(axes[1:], ("pair", "group"), strict=True):
        for ax, image_HWC, values in zip(in_row, images_NHWC, maps[name], strict=True):
            # Pale, so that the colours above it are those of the scale.
            ax.imshow(image_HWC.mean(-1), cmap="gray", vmin=-255, vmax=255)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            ax.imshow(values, cmap=COLOUR_MAP, norm=scale, alpha=0.85, extent=extent)
            _bare(ax)
    rows = ("image", "cosine with the first image", "mean cosine with opposite advantages")
    for ax, text in zip(axes[:, 0], rows, strict=True):
        _label(ax, text)
    shades = ScalarMappable(scale, COLOUR_MAP)
    figure.colorbar(shades, ax=axes[1:], label="Cosine of codes", pad=0.01, alpha=0.85)
    return figure


def _temperature_figure(
    rows: Sequence[Sequence[float]],
    images: Sequence[np.ndarray],
    texts: Sequence[str],
    measure: str,
) -> Figure:
    """Above a column of images for each temperature, below entropy and score."""
    width, height = TEXT_IN + TILE_IN * len(images), TILE_IN * len(texts) + 0.3
    figure = Figure(figsize=(max(width, 4.5), height + 1.8))
    parts: Any = figure.subfigures(2, 1, height_ratios=(height, 1.8))
    above, below = parts
    axes = above.subplots(len(texts), len(images), squeeze=False)
    for in_column, row, images_PHWC in zip(axes.T, rows, images, strict=True):
        in_column[0].set_title(f"T = {row[0]:g}")
        for ax, image_HWC in zip(in_column, images_PHWC, strict=True):
            _show(ax, image_HWC)
    for ax, text in zip(axes[:, 0], texts, strict=True):
        _label(ax, text)
    left, right = below.subplots(1, 2)
    temperatures, score, error, sampled, conditional = np.array(rows, float).T
    left.plot(temperatures, sampled, "o-", ms=2.5, color=COLOURS[0], label="sampled from")
    left.plot(
        temperatures, conditional, "s--", ms=2.5, color=COLOURS[1], label="conditional, T = 1"
    )
    left.set(xlabel="Temperature", ylabel="Entropy (nats / token)")
    left.legend()
    right.errorbar(temperatures, score, error, fmt="o-", ms=2.5, color=COLOURS[0], capsize=2)
    right.set(xlabel="Temperature", ylabel=f"Score ({measure})")
    return figure


def _models_figure(
    texts: Sequence[str],
    images: Mapping[str, np.ndarray],
    spread: Mapping[str, Sequence[float | None]],
) -> Figure:
    """A strip of images for each prompt and model, its diversity below."""
    num_images = next(iter(images.values())).shape[1]
    tile = min(TILE_IN, 6.0 / (num_images * len(images)))
    size = TEXT_IN + tile * num_images * len(images), (tile + 0.15) * len(texts) + 0.3
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.07))
    axes = figure.subplots(len(texts), len(images), squeeze=False)
    for in_column, (name, images_PGHWC) in zip(axes.T, images.items(), strict=True):
        found = [value for value in spread[name] if value is not None]
        mean = f" (diversity {np.mean(found):.2f})" if found else ""
        in_column[0].set_title(f"{name}{mean}", fontweight="bold")
        for ax, images_GHWC, value in zip(in_column, images_PGHWC, spread[name], strict=True):
            _show(ax, _strip(images_GHWC))
            ax.set_xlabel("" if value is None else f"{value:.2f}", labelpad=1, fontsize=6)
    for ax, text in zip(axes[:, 0], texts, strict=True):
        _label(ax, text)
    return figure


def _strip(images_GHWC: np.ndarray) -> np.ndarray:
    """Images beside each other on white."""
    gap = max(1, images_GHWC.shape[2] // 16)
    padded = np.pad(images_GHWC, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-gap]


def _show(ax: Axes, image_HWC: np.ndarray) -> None:
    ax.imshow(image_HWC, interpolation="nearest")
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _label(ax: Axes, text: str) -> None:
    """A text to the left."""
    ax.set_ylabel(textwrap.fill(text, 18), rotation=0, ha="right", va="center", fontsize=6)
