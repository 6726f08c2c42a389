"""Published figures beside ours, and in what the protocols differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_rl.console import aligned
from stage_rl.evaluation.results import OVERALL, Setup
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.detectors.mask2former import Mask2FormerConfig
from stage_rl.rewards.detectors.openmmlab import is_official
from stage_rl.rewards.external import MPLUG_SCORER
from stage_rl.rewards.geneval import GenEvalRewardConfig

GUIDANCE_SCALE = 5.0
JPEG_QUALITY = 75

STAGE = "STAGE, arXiv 2509.25027"
"""Its tables 1 and 4 and its figure 1, as far as they show figures."""
QWEN_IMAGE = "Qwen-Image report, arXiv 2508.02324"

FIGURES = "figures"
"""In place of a measure: what the aggregation of a benchmark prints."""


@dataclass(frozen=True)
class Table:
    """Published figures of one measure."""

    columns: tuple[str, ...]
    """Rows of our table, or names of our figures."""
    models: Mapping[str, str]
    """The figures of each model; a dash stands where there is none."""
    source: str = STAGE
    judged_by: str = ""
    """The judge in words, where one was asked."""
    judge: str | None = None
    """Path, program or engine of the scorer that is the same judge; None: there is none here."""


TASKS = (
    *("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr"),
)
CATEGORIES = (
    *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"),
)
PUBLISHED: Mapping[tuple[str, str], Table] = {
    # Tables 1 and 4. "no KL": without the KL of groups whose rewards are all equal.
    ("geneval", "correct"): Table(
        TASKS,
        {
            "Janus-Pro-7B": "0.78 0.98 0.86 0.56 0.89 0.76 0.63",
            "T2I-R1": "0.79 0.99 0.91 0.53 0.91 0.76 0.65",
            "GRPO": "0.86 0.97 0.92 0.82 0.86 0.84 0.72",
            "+Ent": "0.87 0.99 0.94 0.78 0.90 0.89 0.73",
            "+Ent, no KL": "0.87 0.98 0.93 0.82 0.86 0.86 0.74",
            "GRPO, no KL": "0.81 0.98 0.90 0.73 0.88 0.71 0.67",
            "STAGE": "0.88 0.99 0.93 0.82 0.89 0.91 0.77",
            "STAGE, best checkpoint": "0.89 0.99 0.95 0.82 0.90 0.89 0.79",
            "Janus-Pro-1B": "0.64 - - - - - -",
            "1B, GRPO": "0.57 - - - - - -",
            "1B, +Ent": "0.78 - - - - - -",
            "1B, STAGE": "0.80 - - - - - -",
        },
    ),
    # Table 4 and figure 1b: trained on GenEval.
    ("t2i-compbench", "score"): Table(
        CATEGORIES,
        {
            "Janus-Pro-7B": "0.6355 0.3494 0.4929 0.1931 0.3279 0.4423 0.3087 0.3566",
            "GRPO": "0.7143 0.4028 0.6085 0.2763 - 0.4394 - -",
            "+Ent": "0.7241 0.4063 0.6032 0.2788 - 0.4771 - -",
            "+Ent, no KL": "0.7214 0.4149 0.6214 0.3005 - 0.4923 - -",
            "GRPO, no KL": "0.7269 0.4250 0.6558 0.3072 - 0.4591 - -",
            "STAGE": "0.7463 0.4388 0.6443 0.3053 0.3667 0.5278 0.3107 0.3779",
        },
    ),
    ("hps", "hps"): Table(("overall",), {"Janus-Pro-7B": "28.64"}),
    # Table 4, trained on GenEval; figure 1a, trained on preference.
    ("drawbench", "image_reward"): Table(
        ("overall",),
        {
            "Janus-Pro-7B": "0.76",
            "GRPO": "0.67",
            "+Ent": "0.74",
            "+Ent, no KL": "0.77",
            "GRPO, no KL": "0.76",
            "STAGE": "0.80",
            "GRPO on preference": "0.93",
            "STAGE on preference": "0.98",
        },
    ),
    ("drawbench", "pickscore"): Table(("overall",), {"Janus-Pro-7B": "21.83"}),
    ("drawbench", "aesthetic"): Table(("overall",), {"Janus-Pro-7B": "5.68"}),
    ("drawbench", "deqa"): Table(("overall",), {"Janus-Pro-7B": "3.53"}),
    # Figure 1a, trained on text.
    ("ocr", "ocr"): Table(("overall",), {"Janus-Pro-7B": "0.21", "GRPO": "0.46", "STAGE": "0.49"}),
    # Kept apart from the four styles that "hps" draws.
    ("hps", "hps_v3"): Table(
        ("overall",),
        {"Kolors": "10.55", "FLUX.1-dev": "10.43", "SDXL": "8.20", "SD2": "-0.24"},
        "HPSv3, github.com/MizzenAI/HPSv3",
    ),
    # Those that ask a judge. The size of Janus-Pro is not stated where none is named.
    ("geneval2", FIGURES): Table(
        ("GM", "AM"),
        {
            "SDXL": "9.1 50.1",
            "SD3.5-M, guidance 1, 512 px": "12.4 -",
            "SD3.5-M, guidance 7, 1024 px": "20.4 -",
            "Qwen-Image-2512": "33.0 -",
            "Nano Banana": "44.6 -",
        },
        "GenEval 2, arXiv 2512.16853, at second hand; SD3.5-M: UniRL, issue 221",
        "Qwen3-VL-8B-Instruct, bf16",
        "Qwen/Qwen3-VL-8B-Instruct",
    ),
    ("dpg", FIGURES): Table(
        ("overall", "global", "entity", "attribute", "relation", "other"),
        {
            "Janus-Pro-1B": "82.63 87.58 88.63 88.17 88.98 88.30",
            "Janus-Pro-7B": "84.19 86.90 88.90 89.40 89.32 89.48",
            "SD3-Medium": "84.08 - - - - -",
            "GPT Image 1": "85.15 - - - - -",
            "Qwen-Image": "88.32 - - - - -",
        },
        "reports of Janus-Pro, arXiv 2501.17811, and Qwen-Image, 2508.02324",
        "mPLUG large, fp16",
        MPLUG_SCORER,
    ),
    ("wise", FIGURES): Table(
        ("overall", "Culture", "Time", "Space", "Biology", "Physics", "Chemistry"),
        {
            "Janus-Pro-1B": "0.2650 0.3050 0.2333 0.2333 0.2167 0.3083 0.2000",
            "Janus-Pro-7B": "0.3340 0.3700 0.3500 0.2833 0.2833 0.4000 0.2333",
            "SD-1.5": "0.3090 0.4450 0.3083 0.2083 0.2083 0.2167 0.1500",
            "BAGEL": "0.3520 0.4125 0.3500 0.3083 0.2000 0.4417 0.2583",
            "Qwen-Image": "0.5100 0.6275 0.5250 0.5583 0.3417 0.4833 0.2500",
        },
        "leaderboard of the verified release, not the WiScore of arXiv 2503.07265",
        "Qwen3.5-35B-A3B by vLLM",
        "Qwen/Qwen3.5-35B-A3B",
    ),
    ("oneig-alignment", FIGURES): Table(
        ("overall",),
        {"Janus-Pro": "0.553", "Qwen-Image": "0.882"},
        QWEN_IMAGE,
        "Qwen2.5-VL-7B-Instruct, bf16",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    ("oneig-text", FIGURES): Table(
        ("text",),
        {"Janus-Pro": "0.001", "Qwen-Image": "0.891"},
        QWEN_IMAGE,
        "Qwen2.5-VL-7B-Instruct, bf16",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    ("longtext", FIGURES): Table(
        ("words read",),
        {
            "Janus-Pro": "0.019",
            "BAGEL": "0.373",
            "X-Omni": "0.900",
            "Qwen-Image": "0.943",
            "GPT Image 1": "0.956",
        },
        QWEN_IMAGE,
        "Qwen2.5-VL-7B-Instruct, bf16",
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    ("cvtg", FIGURES): Table(
        ("word accuracy", "NED"),
        {
            "FLUX.1-dev": "0.4965 0.6879",
            "Qwen-Image": "0.8288 0.9116",
            "GPT Image 1": "0.8569 0.9478",
        },
        QWEN_IMAGE,
        "PaddleOCR 2.10",
        "paddleocr",
    ),
    ("unigenbench", FIGURES): Table(
        (
            *("overall", "Style", "World Knowledge", "Attribute", "Action", "Relationship"),
            *("Logical Reasoning", "Grammar", "Compound", "Entity Layout", "Text Generation"),
        ),
        {
            "Janus-Pro": "61.36 90.40 86.55 68.59 63.88 69.54 35.68 64.04 60.18 72.76 2.01",
            "Janus": "51.60 - - - - - - - - - -",
            "BAGEL": "59.91 - - - - - - - - - -",
            "FLUX.1-dev": "60.97 - - - - - - - - - -",
            "Qwen-Image": "78.36 - - - - - - - - - -",
        },
        "leaderboard of UniGenBench++, arXiv 2510.18701",
        "Gemini-2.5-Pro",
    ),
    ("tiif", FIGURES): Table(
        ("short", "long"),
        {
            "Janus-Pro": "65.38 61.10",
            "Janus-Pro (GPT-4o)": "66.67 65.19",
            "BAGEL (GPT-4o)": "70.97 71.79",
            "Qwen-Image (GPT-4o)": "86.14 86.83",
        },
        "recomputed from the published answers, arXiv 2506.02161; the others by " + QWEN_IMAGE,
        "Qwen2.5-VL-72B-Instruct where no other is named",
        "Qwen/Qwen2.5-VL-72B-Instruct",
    ),
}
"""By benchmark and measure. Those of the STAGE paper are of a 7B model where none is named."""

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
RAPID = "RapidOCR reads in place of PaddleOCR 2"
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
    "ocr": {"": (RAPID,)},
    "diversity": {"": ("the paper names no measure of diversity",)},
    "dpg": {
        "": (
            GRID,
            "the file's first question is asked, which the published script skips",
            "categories pool all images, there the last",
        )
    },
    "wise": {"": ("the judge answers without vLLM",)},
    "oneig-alignment": {"": (GRID,)},
    "oneig-text": {
        "": (GRID, "a transcription may have 256 tokens, there 128 for texts of up to 60 words")
    },
    "longtext": {
        "": (
            "transcriptions are greedy, there sampled as the checkpoint says",
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
    RAPID: _is_set("ocr", "engine", "paddleocr"),
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
    """Whether GenEval is judged by its evaluator's own detector, looking as that one does."""
    detector = config.detector if isinstance(config, GenEvalRewardConfig) else None
    if not isinstance(detector, Mask2FormerConfig) or not is_official(detector.path):
        return False
    kept = {"path": detector.path, "batch_size": detector.batch_size}
    return detector == Mask2FormerConfig(**kept)


def _judge_of(settings: Mapping[str, Any]) -> str:
    """Who scores: weights, program or engine where the settings name one, else the kind."""
    if "command" in settings:
        return str(settings["command"][-1])
    return str(settings.get("path", settings.get("engine", settings["kind"])))


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
