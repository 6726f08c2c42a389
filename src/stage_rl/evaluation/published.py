"""Published figures beside ours where the protocol is the same, and where it is not, in what.

The rows are those of the STAGE paper, arXiv 2509.25027.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from stage_rl.rewards.base import RewardConfig

SOURCE = "STAGE, arXiv 2509.25027"
GUIDANCE_SCALE = 5.0
JPEG_QUALITY = 75
OVERALL = "overall"
Figures = Mapping[str, Mapping[str, float]]
"""By model, then by row of our table."""

PUBLISHED: Mapping[str, Mapping[str, Figures]] = {
    "geneval": {
        "correct": {
            "Janus-Pro-7B": {OVERALL: 0.78},
            "Janus-Pro-7B, GRPO": {OVERALL: 0.86},
            "Janus-Pro-7B, GRPO + entropy reward": {OVERALL: 0.87},
            "Janus-Pro-7B, STAGE": {OVERALL: 0.88},
            "Janus-Pro-1B": {OVERALL: 0.64},
            "Janus-Pro-1B, STAGE": {OVERALL: 0.80},
        }
    },
    "t2i-compbench": {
        "score": {
            "Janus-Pro-7B": {
                "color": 0.6355,
                "shape": 0.3494,
                "texture": 0.4929,
                "spatial": 0.1931,
                "3d_spatial": 0.3279,
                "numeracy": 0.4423,
                "non_spatial": 0.3087,
                "complex": 0.3566,
            },
            "Janus-Pro-7B, GRPO": {"color": 0.714},
            "Janus-Pro-7B, STAGE": {"color": 0.746},
        }
    },
    "hps": {"hps": {"Janus-Pro-7B": {OVERALL: 28.64}}},
    "drawbench": {
        "image_reward": {
            "Janus-Pro-7B": {OVERALL: 0.76},
            "Janus-Pro-7B, GRPO": {OVERALL: 0.67},
            "Janus-Pro-7B, STAGE": {OVERALL: 0.80},
        },
        "pickscore": {"Janus-Pro-7B": {OVERALL: 21.83}},
        "aesthetic": {"Janus-Pro-7B": {OVERALL: 5.68}},
        "deqa": {"Janus-Pro-7B": {OVERALL: 3.53}},
    },
    "ocr": {"ocr": {"Janus-Pro-7B": {OVERALL: 0.21}}},
}
"""By benchmark and measure."""

BLIP = "BLIP is transformers' base model and noun phrases come from word lists, not from a parser"
UNIDET = "GroundingDINO finds the objects in place of UniDet, and what it finds counts in full"
ON_TOP = "'on top of' can hold (spatial.compat=release: never, as published)"
AXES = "its axes are in order (depth.compat=release: exchanged, as published)"
DEPARTURES: Mapping[str, Mapping[str, str]] = {
    "geneval": {
        "": "Mask2Former is transformers' checkpoint, not the evaluator's own; scores shift by an "
        "amount that is not known"
    },
    "t2i-compbench": {
        **dict.fromkeys(("color", "shape", "texture"), BLIP),
        "spatial": f"{UNIDET}; {ON_TOP}",
        "3d_spatial": f"{UNIDET}; depth comes from a network that reads 384 pixels; {AXES}",
        "numeracy": UNIDET,
        "complex": f"{UNIDET}; {ON_TOP}; {BLIP}",
        OVERALL: "the paper has no mean over the categories",
    },
    "ocr": {"": "RapidOCR reads in place of PaddleOCR 2"},
    "diversity": {"": "the paper names no measure of diversity"},
}
"""Rows whose protocol is not the published one, and why; an empty row stands for all."""


@dataclass(frozen=True)
class Conditions:
    """How the images and the scores of a benchmark were made."""

    guidance_scale: float | None
    """None: made elsewhere."""
    complete: bool
    """All prompts have as many images as the benchmark asks for."""
    smoke: bool
    scorers: Mapping[str, RewardConfig]
    left_out: tuple[str, ...] = ()
    """Scorers that were told not to run."""


def departures(benchmark: str, conditions: Conditions) -> dict[str, str]:
    """By row of the table, why it cannot be held against the paper; an empty row stands for all."""
    found = dict(DEPARTURES.get(benchmark, {}))
    reasons = [found[""]] if "" in found else []
    if conditions.smoke:
        reasons.append("a smoke run: the prompts are the shapes world's, the scorers random")
    if not conditions.complete:
        reasons.append("not all images of the benchmark are there")
    scale = conditions.guidance_scale
    if scale is not None and scale != GUIDANCE_SCALE:
        reasons.append(f"drawn with guidance {scale:g}, the paper's is {GUIDANCE_SCALE:g}")
    if conditions.left_out:
        reasons.append(f"left out: {', '.join(conditions.left_out)}")
    if benchmark in ("hps", "drawbench"):
        plain = [
            name
            for name, config in conditions.scorers.items()
            if getattr(config, "jpeg_quality", JPEG_QUALITY) != JPEG_QUALITY
        ]
        if plain:
            write = " ".join(f"{name}.jpeg_quality={JPEG_QUALITY}" for name in plain)
            reasons.append(f"the paper scores JPEG files of quality {JPEG_QUALITY}; add {write}")
    if reasons:
        return {"": "; ".join(reasons)}
    return found


def comparable(benchmark: str, conditions: Conditions) -> dict[str, Figures]:
    """The published figures of the rows with the same protocol, by measure."""
    others = departures(benchmark, conditions)
    if "" in others:
        return {}
    kept: dict[str, Figures] = {}
    for measure, models in PUBLISHED.get(benchmark, {}).items():
        rows = {
            model: {row: value for row, value in figures.items() if row not in others}
            for model, figures in models.items()
        }
        kept[measure] = {model: figures for model, figures in rows.items() if figures}
    return {measure: models for measure, models in kept.items() if models}


def statements(benchmark: str, conditions: Conditions, measures: Collection[str]) -> list[str]:
    """What a table of some measures is followed by: published rows, and what cannot be compared."""
    lines = []
    for measure, models in comparable(benchmark, conditions).items():
        if measure not in measures:
            continue
        lines.append(f"published {measure} ({SOURCE}):")
        for model, figures in models.items():
            told = ", ".join(f"{row} {value:g}" for row, value in figures.items())
            lines.append(f"  {model}: {told}")
    by_reason: dict[str, list[str]] = {}
    for row, reason in departures(benchmark, conditions).items():
        by_reason.setdefault(reason, []).append(row)
    for reason, rows in by_reason.items():
        which = "" if rows == [""] else f" ({', '.join(rows)})"
        lines.append(f"not comparable with published figures{which}: {reason}")
    return lines
