"""The benchmarks whose images a judge is asked questions about: one kind, a table of nine.

A question file says what is asked (`prompts/questions.py`), the reward `judge` or a program asks
it, and `aggregation.py` makes the figures that papers print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from stage_rl.evaluation import aggregation
from stage_rl.evaluation.aggregation import (
    PromptAnswers,
    alignment,
    dependency_graph,
    dependent_mean,
    geometric_mean,
    nine_groups,
    prompt_answers,
    region_words,
    soft_tifa,
    ten_dimensions,
    text_rendering,
    wise_weights,
    word_overlap,
)
from stage_rl.evaluation.suites import PromptSet, Scorer, Scores, Suite, values
from stage_rl.prompts.question_sources import SOURCES, unlike_published
from stage_rl.prompts.questions import QuestionsPromptsConfig
from stage_rl.rewards.external import MPLUG_SCORER
from stage_rl.types import Prompt

JUDGE = "judge"

OfImage = Callable[[PromptAnswers], float]
"""The value of one image whose answers are all there, on the scale of the benchmark's figures."""

READ = (
    "Recognize the text in the image, only reply with the text content, but avoid repeating "
    "previously mentioned content. If no text is recognized, please reply with 'No text "
    "recognized'."
)
"""What X-Omni and OneIG-Bench ask of Qwen2.5-VL."""

QWEN25 = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN3 = "Qwen/Qwen3-VL-8B-Instruct"


def _measures(of_image: OfImage, judge: str, prompt: Prompt, scores: Scores) -> dict[str, float]:
    """`score` by the benchmark's own rule; an image with an answer missing has none."""
    measures = values(prompt, scores)
    if measures.pop(judge, None) is None:
        return measures
    return {"score": of_image(prompt_answers(prompt, [scores[judge]])), **measures}


def _suite(
    name: str,
    place: int,
    *,
    scorers: Mapping[str, Scorer],
    of_image: OfImage,
    aggregate: Callable[[Sequence[PromptAnswers]], Mapping[str, float]],
    task_of: Callable[[Prompt], str],
    gpu_gb: float | None = None,
    minutes: float | None = None,
) -> Suite:
    source, file = SOURCES[name], f"questions/{name}.jsonl"
    judge = next(iter(scorers))
    shipped = resources.files("stage_rl") / "evaluation" / f"{file}.gz"
    return Suite(
        name=name.replace("_", "-"),
        prompt_set=PromptSet(
            name,
            partial(_shipped, str(shipped)) if shipped.is_file() else None,
            where=file,
            kind="questions",
            is_set=lambda path: path.is_file() and path.name.split(".")[0] == name,
            departure=unlike_published,
            first_index=100_000 * place,
            size=source.num_prompts,
        ),
        images_per_prompt=source.images_per_prompt,
        scorers=scorers,
        task_of=task_of,
        by_task=("score",),
        measures_of=partial(_measures, of_image, judge),
        pooled=True,
        answers=judge,
        aggregate=aggregate,
        gpu_gb=gpu_gb,
        minutes=minutes,
    )


def _shipped(file: str) -> Sequence[Prompt]:
    return QuestionsPromptsConfig(path=str(Path(file))).build()


def _judge(mode: str, path: str, **settings: Any) -> dict[str, Scorer]:
    return {JUDGE: Scorer({"kind": "judge", "mode": mode, "path": path, **settings})}


def _group(axis: str, suffix: str = "") -> Callable[[Prompt], str]:
    return lambda prompt: prompt.metadata["groups"][axis] + suffix


def _values(row: PromptAnswers) -> list[float]:
    return aggregation.whole_values(row.images[0]) or []


def _mean(row: PromptAnswers, scale: float = 1.0) -> float:
    given = _values(row)
    return scale * sum(given) / len(given)


def _words(row: PromptAnswers) -> float:
    return word_overlap([row])["words read"]


def _dependent(parents: Any, scale: float) -> OfImage:
    return lambda row: scale * dependent_mean(row.questions, _values(row), parents=parents)


GENEVAL2 = _suite(
    "geneval2",
    5,
    scorers=_judge("token_probability", QWEN3, template="{question} Answer in one word."),
    of_image=lambda row: 100 * geometric_mean(_values(row)),
    aggregate=soft_tifa,
    task_of=_group("atoms", " atoms"),
    gpu_gb=17.5,
)

DPG = _suite(
    "dpg",
    6,
    scorers={
        JUDGE: Scorer(
            {
                "kind": "external",
                "command": ["mplug/bin/python", MPLUG_SCORER],
                "timeout_s": 900,
            }
        )
    },
    of_image=_dependent("zeroed", 100),
    aggregate=partial(dependency_graph, scale=100),
    task_of=lambda prompt: "prompts",
    minutes=60,
)

WISE = _suite(
    "wise",
    7,
    scorers=_judge(
        "score_line",
        "Qwen/Qwen3.5-35B-A3B",
        system="You are a professional text-to-image quality auditor. Evaluate the image strictly "
        "according to the protocol.",
        image_first=False,
        max_new_tokens=500,
    ),
    of_image=_mean,
    aggregate=wise_weights,
    task_of=_group("category"),
    gpu_gb=70,
)

ONEIG_ALIGNMENT = _suite(
    "oneig_alignment",
    8,
    scorers=_judge(
        "reply_equals",
        QWEN25,
        template="{question}. Please answer 'Yes' or 'No' only.",
        answers=["Yes"],
        jpeg_quality=75,
    ),
    of_image=_dependent("raw", 1),
    aggregate=alignment,
    task_of=_group("category"),
    minutes=60,
)

ONEIG_TEXT = _suite(
    "oneig_text",
    9,
    scorers=_judge("read_text", QWEN25, template=READ, max_new_tokens=256, jpeg_quality=75),
    of_image=lambda row: text_rendering([row])["text"],
    aggregate=text_rendering,
    task_of=lambda prompt: "prompts",
)

LONGTEXT = _suite(
    "longtext",
    10,
    scorers=_judge("read_text", QWEN25, template=READ, max_new_tokens=1024),
    of_image=_words,
    aggregate=word_overlap,
    task_of=_group("category"),
    minutes=15,
)


def _found_words(row: PromptAnswers) -> float:
    return region_words([row])["word accuracy"]


def _cvtg(prompt: Prompt, scores: Scores) -> dict[str, float]:
    """With CLIPScore, 2.5 times a cosine above 0 (arXiv 2104.08718)."""
    measures = _measures(_found_words, "ocr", prompt, scores)
    if "clip" in measures:
        measures["clip"] = 2.5 * max(0.0, measures["clip"])
    return measures


CVTG = replace(
    _suite(
        "cvtg",
        11,
        scorers={
            "ocr": Scorer({"kind": "ocr", "turned": True}),
            "clip": Scorer(
                {
                    "kind": "clip_score",
                    "path": "openai/clip-vit-large-patch14",
                    "prefix": "A photo depicts ",
                }
            ),
        },
        of_image=_found_words,
        aggregate=region_words,
        task_of=_group("regions", " regions"),
        gpu_gb=0,
        minutes=60,
    ),
    measures_of=_cvtg,
)

UNIGENBENCH = _suite(
    "unigenbench",
    12,
    scorers=_judge(
        "binary_lists",
        "CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1",
        max_new_tokens=4096,
        jpeg_quality=95,
    ),
    of_image=partial(_mean, scale=100),
    aggregate=ten_dimensions,
    task_of=_group("category"),
    gpu_gb=65,
    minutes=60,
)

TIIF = _suite(
    "tiif",
    13,
    scorers=_judge(
        "one_reply_lines",
        QWEN3,
        system="You are a professional image critic.",
        image_first=False,
        max_new_tokens=1024,
    ),
    of_image=partial(_mean, scale=100),
    aggregate=nine_groups,
    task_of=_group("length"),
    gpu_gb=17.5,
    minutes=20,
)
