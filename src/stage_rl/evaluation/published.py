"""Published figures beside ours, and in what the protocols differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from filecmp import cmp
from pathlib import Path
from typing import Any

from stage_rl.console import aligned
from stage_rl.evaluation.published_figures import FIGURES, PADDLE, PUBLISHED, Table
from stage_rl.evaluation.results import OVERALL, Setup
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.detectors.mask2former import Mask2FormerConfig
from stage_rl.rewards.detectors.openmmlab import is_official
from stage_rl.rewards.external import MPLUG_SCORER
from stage_rl.rewards.geneval import GenEvalRewardConfig
from stage_rl.rewards.ocr import OcrRewardConfig, engine_name

GUIDANCE_SCALE = 5.0
JPEG_QUALITY = 75

MOST_MISSING = 0.01
"""Share of images without a score in a figure that is held against published ones."""

BLIP = "BLIP is transformers' base model and noun phrases come from word lists, not from a parser"
UNIDET = "GroundingDINO finds the objects in place of UniDet, and what it finds counts in full"
ON_TOP = "'on top of' can hold (spatial.compat=release: never, as published)"
AXES = "its axes are in order (depth.compat=release: exchanged, as published)"
DETECTOR = (
    "the Mask2Former is not the evaluator's own; scores shift by an amount that is not known "
    "(geneval.detector.path=FILE.pth: OpenMMLab's weights)"
)
COLORS = "CLIP tells colours in fp32, there under fp16 autocast"
GRID = "each image is shown whole, not cut from a grid of four"
SAMPLED = "replies are greedy, there as the checkpoint's own settings say"
BLACK = "an image that is black all over counts, there it is left out"
READER = "another engine than PaddleOCR 2 reads"
DEPARTURES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "geneval": {"": (DETECTOR, COLORS)},
    "t2i-compbench": {
        **dict.fromkeys(("color", "shape", "texture"), (BLIP,)),
        "spatial": (UNIDET, ON_TOP),
        "3d_spatial": (UNIDET, "depth comes from a network that reads 384 pixels", AXES),
        "numeracy": (UNIDET,),
        "complex": (UNIDET, ON_TOP, BLIP),
        OVERALL: ("the paper has no mean over the categories",),
    },
    "hps": {"hps_v3": ("its published figures are of the twelve categories of HPDv3",)},
    "ocr": {"": (READER,)},
    "diversity": {"": ("the paper names no measure of diversity",)},
    "dpg": {
        "": (
            GRID,
            "the file's first question is asked, which the published script skips",
            "categories pool all images, there the last",
        )
    },
    "wise": {"": ("the judge answers without vLLM",)},
    "oneig-alignment": {"": (GRID, BLACK, SAMPLED)},
    "oneig-text": {
        "": (
            *(GRID, BLACK, SAMPLED),
            "a transcription may have 256 tokens, there 128 for texts of up to 60 words",
        )
    },
    "longtext": {
        "": (
            SAMPLED,
            "'addCriterion' is removed from them, there it stays",
        )
    },
    "unigenbench": {"": ("replies are greedy, there as the server samples",)},
    "tiif": {
        "": ("the first of three templates, greedy, there one of them at random at temperature 1",)
    },
}
"""Rows whose protocol is not the published one, and why; an empty row stands for all."""

Scorers = Mapping[str, RewardConfig]


def _is_set(name: str, key: str, value: str) -> Callable[[Scorers], bool]:
    return lambda scorers: getattr(scorers.get(name), key, None) == value


LIFTED: Mapping[str, Callable[[Scorers], bool]] = {
    DETECTOR: lambda scorers: _has_own_detector(scorers.get("geneval")),
    ON_TOP: _is_set("spatial", "compat", "release"),
    AXES: _is_set("depth", "compat", "release"),
    READER: lambda scorers: _reads_as_published(scorers.get("ocr")),
}
"""Departures that other settings of a reward put right."""

NEARER = {
    *("spatial.compat", "depth.compat", "ocr.engine", "geneval.detector.path"),
    *(f"{name}.jpeg_quality" for name in ("hps", "image_reward", "pickscore", "aesthetic")),
}
"""Settings that bring a run nearer to the published protocol than those of the suite are."""

WEIGHTS = ("path", "head", "base", "clip")
"""Settings that name weights, on whatever level of a reward."""


def departures(
    setup: Setup,
    *,
    scorers: Scorers,
    own: Mapping[str, Mapping[str, Any]],
    smoke: bool,
    missing: float = 0.0,
    others: Sequence[str] = (),
) -> dict[str, str]:
    """By row of the table, in what its protocol is not the published one; an empty row stands for
    all.

    `own`: the settings of the benchmark's scorers, its judge first; `missing`: the share of images
    without a score; `others`: what else is known, of prompts and images.
    """
    found = {
        row: kept
        for row, clauses in DEPARTURES.get(setup.benchmark, {}).items()
        if (kept := [one for one in clauses if one not in LIFTED or not LIFTED[one](scorers)])
        and (row != "hps_v3" or row in scorers)
    }
    reasons = found.pop("", [])
    if smoke:
        reasons.append("a smoke run: the prompts are the shapes world's, the scorers random")
    reasons += others
    table = PUBLISHED.get((setup.benchmark, FIGURES))
    if table is None:
        reasons += _other_sampling(setup)
    elif not smoke:
        reasons += _other_judge(table, setup.scorers.get(next(iter(own), "")))
    if not smoke:
        reasons += _other_settings(setup.scorers, own, has_judge=table is not None)
    if missing > MOST_MISSING:
        reasons.append(f"{missing:.1%} of the images have no score: not comparable")
    left_out = [name for name in own if name not in scorers]
    if left_out:
        reasons.append(f"left out: {', '.join(left_out)}")
    if setup.benchmark in ("hps", "drawbench"):
        reasons += _other_quality(scorers)
    rows = {row: "; ".join(clauses) for row, clauses in found.items()}
    return rows | ({"": "; ".join(reasons)} if reasons else {})


def _other_sampling(setup: Setup) -> list[str]:
    """In what images were not drawn as those of the paper; the reports of other models have each
    their own way.
    """
    scale, temperature, reasons = setup.guidance_scale, setup.temperature, []
    if scale not in (None, GUIDANCE_SCALE):
        reasons.append(f"drawn with guidance {scale:g}, the paper's is {GUIDANCE_SCALE:g}")
    if temperature not in (None, 1):
        reasons.append(f"drawn at temperature {temperature:g}, the paper's is 1")
    if setup.top_k:
        reasons.append(f"drawn from the {setup.top_k} likeliest tokens, the paper's from all")
    return reasons


def _other_quality(scorers: Scorers) -> list[str]:
    other = [
        f"{name}.jpeg_quality={JPEG_QUALITY}"
        for name, config in scorers.items()
        if getattr(config, "jpeg_quality", JPEG_QUALITY) != JPEG_QUALITY
    ]
    if not other:
        return []
    return [f"the paper scores JPEG files of quality {JPEG_QUALITY}; add {' '.join(other)}"]


def _has_own_detector(config: RewardConfig | None) -> bool:
    """Whether GenEval is judged by its evaluator's own detector."""
    detector = config.detector if isinstance(config, GenEvalRewardConfig) else None
    return isinstance(detector, Mask2FormerConfig) and is_official(detector.path)


def _reads_as_published(config: RewardConfig | None) -> bool:
    return isinstance(config, OcrRewardConfig) and engine_name(config.engine) == PADDLE


def _judge_of(settings: Mapping[str, Any]) -> str:
    """Who scores: weights, program or engine where the settings name one, else the kind."""
    if "command" in settings:
        program = Path(settings["command"][-1])
        is_ours = program.is_file() and cmp(program, MPLUG_SCORER, shallow=False)
        return MPLUG_SCORER if is_ours else str(program)
    if "engine" in settings:
        return engine_name(settings["engine"])
    return str(settings.get("path", settings["kind"]))


def _other_judge(table: Table, judge: Mapping[str, Any] | None) -> list[str]:
    """That the published figures are another judge's, in words; none where they are not."""
    if judge is None or (ours := _judge_of(judge)) == table.judge:
        return []
    is_copy = table.judge is not None and Path(ours).expanduser().is_dir()
    verdict = f"comparable if that is {table.judge}" if is_copy else "not comparable"
    return [f"judged by {ours}, the published figures by {table.judged_by}: {verdict}"]


WHO = ("path", "command", "engine")
"""Settings of a judge that say who it is."""


def _other_settings(
    scorers: Mapping[str, Mapping[str, Any]],
    own: Mapping[str, Mapping[str, Any]],
    *,
    has_judge: bool,
) -> list[str]:
    """Settings that are not the benchmark's own, in words; `has_judge`: the first scorer is a
    judge, and who it is is said elsewhere.
    """
    reasons = []
    for place, (name, known) in enumerate(own.items()):
        ours = scorers.get(name, known)
        if ours["kind"] != known["kind"]:
            known = {"kind": known["kind"]}
        said = WHO if has_judge and place == 0 else ()
        for key, value, theirs in _differences(ours, known):
            told = f"{name}.{key}={_short(value)}"
            if f"{name}.{key}" in NEARER or key == "tries" or key in said:
                continue
            if key.rpartition(".")[2] in WEIGHTS:
                reasons.append(f"{told} is not known to be {theirs}")
            else:
                reasons.append(f"{told}, the benchmark has {_short(theirs)}")
    return reasons


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], start: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key and both values of every setting of theirs that is another in ours."""
    for key, other in theirs.items():
        value = ours.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{start}{key}.")
        elif value != other:
            yield f"{start}{key}", value, other


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def statements(
    benchmark: str,
    ours: Mapping[str, Mapping[str, float]],
    departures: Mapping[str, str],
    *,
    smoke: bool = False,
) -> list[str]:
    """What a table is followed by: the published figures beside `ours`, by measure and row, and in
    what the protocols differ.

    A smoke run has nothing to be held against; a benchmark that is not of the paper's kind says
    nothing.
    """
    if benchmark not in {name for name, _ in PUBLISHED} | DEPARTURES.keys():
        return []
    lines = []
    for (name, measure), table in PUBLISHED.items():
        if name == benchmark and measure in ours and not smoke:
            lines += _beside(table, "" if measure == FIGURES else measure, ours[measure])
    for reason in dict.fromkeys(departures.values()):
        rows = [row for row, why in departures.items() if why == reason]
        which = "" if rows == [""] else f" ({', '.join(rows)})"
        lines.append(f"not the published protocol{which}: {reason}")
    return lines


def _beside(table: Table, measure: str, ours: Mapping[str, float]) -> list[str]:
    """A published table with our row in it."""
    own = [f"{ours[name]:.4g}" if name in ours else "" for name in table.columns]
    cells = ([model, *figures.split()] for model, figures in table.models.items())
    judge = f"; judge: {table.judged_by}; drawn as their authors do" if table.judged_by else ""
    rows = aligned([[measure, *table.columns], ["this model", *own], *cells])
    return ["", f"published ({table.source}{judge}):", *rows]
