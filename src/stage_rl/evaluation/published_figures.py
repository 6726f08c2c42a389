"""Figures that others published of their models, with source and judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stage_rl.rewards.external import MPLUG_SCORER

STAGE = "STAGE, arXiv 2509.25027"
"""Its tables 1 and 4 and its figure 1, as far as they show figures."""
QWEN_IMAGE = "Qwen-Image report, arXiv 2508.02324"

PADDLE = "paddleocr 2"
"""What reads texts in published figures, as `rewards.ocr.engine_name` calls it."""

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
            "BAGEL, CoT": "0.6280 - - - - - -",
            "Qwen-Image": "0.5100 0.6275 0.5250 0.5583 0.3417 0.4833 0.2500",
            "FLUX.2-dev": "0.5650 - - - - - -",
            "GPT-Image-1.5": "0.8250 - - - - - -",
            "Nano Banana Pro": "0.8760 - - - - - -",
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
            "Seedream 4.5": "0.989",
        },
        f"{QWEN_IMAGE}; Seedream 4.5 at second hand",
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
        PADDLE,
    ),
    ("cvtg", "clip"): Table(
        ("overall",),
        {"Qwen-Image": "0.8017", "GPT Image 1": "0.7982"},
        QWEN_IMAGE,
        "CLIP ViT-L/14",
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
            "FLUX.2-dev": "84.76 - - - - - - - - - -",
            "GPT-4o": "92.48 - - - - - - - - - -",
            "Nano Banana Pro": "92.72 - - - - - - - - - -",
        },
        "leaderboard of UniGenBench++, arXiv 2510.18701",
        "Gemini-2.5-Pro",
    ),
    ("tiif", FIGURES): Table(
        ("short", "long"),
        {
            "Janus-Pro, recomputed": "65.38 61.10",
            "Janus-Pro (GPT-4o), recomputed": "66.67 65.19",
            "Janus-Pro (GPT-4o)": "66.50 65.02",
            "BAGEL (GPT-4o)": "70.97 71.79",
            "Qwen-Image (GPT-4o)": "86.14 86.83",
            "GPT Image 1 (GPT-4o)": "89.15 88.29",
        },
        "arXiv 2506.02161, recomputed from its published answers; the others by " + QWEN_IMAGE,
        "Qwen2.5-VL-72B-Instruct where no other is named",
        "Qwen/Qwen2.5-VL-72B-Instruct",
    ),
}
"""By benchmark and measure. Those of the STAGE paper are of a 7B model where none is named."""
