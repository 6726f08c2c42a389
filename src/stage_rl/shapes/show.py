"""`stage shapes show`: the scores of a shapes model, each beside its target."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stage_rl.errors import InputError, StageError
from stage_rl.evaluation.benchmark import Results
from stage_rl.evaluation.progress import progress
from stage_rl.evaluation.results import render_table
from stage_rl.evaluation.runner import evaluate
from stage_rl.evaluation.shapes_geneval import GUIDANCE_SCALE
from stage_rl.rollout.sampling import Sampling
from stage_rl.shapes.show_regime import RegimeFigures, measure_regime
from stage_rl.shapes.show_tokenizer import TokenizerFigures, measure_tokenizer
from stage_rl.training.models import load_policy

HARD_TASKS = ("counting", "position", "color_attr")


@dataclass(frozen=True)
class Figure:
    """A number beside its target."""

    name: str
    value: float | None
    """None: not known, because nothing was there to measure."""
    low: float | None = None
    high: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the number lies outside its target."""
        if self.value is None:
            return False
        below = self.low is not None and self.value < self.low
        return below or (self.high is not None and self.value > self.high)

    def line(self) -> str:
        """Name, number, target, and `missed` where it is."""
        words = {
            (False, False): "",
            (True, False): f"target >= {self.low}",
            (False, True): f"target <= {self.high}",
            (True, True): f"target {self.low} to {self.high}",
        }
        target = words[self.low is not None, self.high is not None]
        verdict = "  missed" if self.missed else ""
        number = "not known" if self.value is None else f"{self.value:.3f}"
        return f"{self.name:<50}{number:>9}  {target}{verdict}".rstrip()


def main(
    *,
    model: str = "shapes",
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0),
    guidance_scale: float = GUIDANCE_SCALE,
    training_guidance: float = 1.0,
    images_per_task: int = 100,
    regime_images: int = 2048,
    renders: int = 1000,
    seed: int = 0,
    dtype: str = "mixed",
    json_: str = "",
) -> None:
    """Print the scores of a shapes model, each beside its target; `missed` marks the others.

    --model: `shapes` (the shipped one), a folder or a run. --guidance-scales: at which GenEval is
    measured. --guidance-scale: the one that the policy's targets are about. --training-guidance: of
    the regime. --images-per-task, --regime-images, --renders: how many images each part is measured
    on. --json: a file for all figures.
    """
    file = Path(json_) if json_ else None
    counts = {"images-per-task": images_per_task, "regime-images": regime_images}
    _check(file, {**counts, "renders": renders})
    sampling = Sampling(guidance_scale=training_guidance)
    policy = load_policy(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = measure_tokenizer(policy, renders, seed=seed)
    _section(f"tokenizer, {renders} renders", tokenizer_figures(tokenizer))
    results = {
        scale: evaluate(
            policy, images_per_task=images_per_task, guidance_scale=scale, seed=seed, dtype=dtype
        )
        for scale in sorted({*guidance_scales, guidance_scale})
    }
    print(geneval_tables(results))
    geneval = geneval_figures(results[guidance_scale])
    _section(f"base policy at guidance {guidance_scale:g}, gold judge", geneval)
    with progress("regime", regime_images) as advance:
        regime = measure_regime(
            policy, regime_images, sampling=sampling, seed=seed, dtype=dtype, advance=advance
        )
    figures = regime_figures(regime)
    _section(f"regime at guidance {training_guidance:g}, {regime_images} images", figures)
    if file is not None:
        shown = [*tokenizer_figures(tokenizer), *geneval, *figures]
        missed = [figure.name for figure in shown if figure.missed]
        _write(file, {**_record(model, tokenizer, results, regime), "missed": missed})


def tokenizer_figures(seen: TokenizerFigures) -> list[Figure]:
    """The tokenizer beside its targets."""
    return [
        Figure("gold judge right on renders", seen.gold_on_renders, 0.99),
        Figure("renders that stay right after encode and decode", seen.kept, 0.97),
        Figure("codes in use", seen.codes_used),
        Figure("pairs of different codes with cosine >= 0.8", seen.lookalike_pairs),
        Figure("used codes with such a look-alike", seen.lookalike_codes),
    ]


def geneval_figures(results: Results) -> list[Figure]:
    """The gold scores beside their targets."""
    gold = results.summary("gold")
    hard = [Figure(task, gold.tasks[task].mean, 0.25) for task in HARD_TASKS]
    return [Figure("overall", gold.overall.mean, 0.45, 0.8), *hard]


def regime_figures(seen: RegimeFigures) -> list[Figure]:
    """The regime beside its targets."""
    return [
        Figure("entropy / ln V", seen.entropy, 0.35, 0.65),
        Figure("entropy / ln V, background tokens", seen.entropy_background, 0.2),
        Figure("entropy / ln V, object tokens", seen.entropy_objects),
        Figure("mean similarity to opposite-sign samples", seen.similarity, 0.3, 0.6),
        Figure("groups of 8 with equal rewards", seen.equal_reward_groups, 0.2, 0.45),
        Figure("pass@1 by the reward detector", seen.pass_at_1),
        Figure("pass@8 - pass@1", seen.headroom, 0.25),
        Figure("agreement of detector and gold judge", seen.agreement, 0.85, 0.93),
    ]


def geneval_tables(results: dict[float, Results]) -> str:
    """Each judge's scores by task, then all other measures, a column per guidance scale."""
    columns = {f"guidance {scale:g}": one for scale, one in results.items()}
    some = next(iter(results.values()))
    blocks = [
        f"GenEval by the {'gold judge' if judge == 'gold' else 'reward detector'}\n"
        + render_table({name: one.summary(judge) for name, one in columns.items()})
        for judge in some.by_task
    ]
    return "\n\n".join([*blocks, "\n".join(_other_measures(list(columns.values())))]) + "\n"


def _other_measures(results: Sequence[Results]) -> Iterator[str]:
    names = [name for name in results[0].scores if name not in results[0].by_task]
    for name in names:
        cells = [
            f"{one.summary(name).overall.mean:.3f}" if name in one.scores else "-"
            for one in results
        ]
        yield f"{name:<22}" + "".join(f"{cell:>10}" for cell in cells)


def _check(file: Path | None, counts: dict[str, int]) -> None:
    if file is not None and not file.parent.is_dir():
        raise InputError(f"--json {file}: no folder '{file.parent}'; name a folder that is")
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name}: {value} is out of range; write at least 1")


def _section(title: str, figures: Sequence[Figure]) -> None:
    print("\n".join([title, *(f"  {figure.line()}" for figure in figures), ""]), flush=True)


def _record(
    model: str, tokenizer: TokenizerFigures, results: dict[float, Results], regime: RegimeFigures
) -> dict[str, Any]:
    geneval = {
        f"{scale:g}": {name: one.summary(name).to_json() for name in one.scores}
        for scale, one in results.items()
    }
    return {
        "model": model,
        "tokenizer": asdict(tokenizer),
        "geneval": geneval,
        "regime": asdict(regime),
    }


def _write(file: Path, figures: dict[str, Any]) -> None:
    try:
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StageError(f"--json {file}: {error.strerror}; name another file") from error
