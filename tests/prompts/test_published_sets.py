"""The loaders on the published files, found through STAGE_PROMPT_DATA."""

import csv
import os
from collections import Counter
from pathlib import Path

import pytest

from stage_rl.prompts.files import PromptsConfig, as_prompts
from stage_rl.prompts.geneval import CLASSES, geneval_prompts
from stage_rl.prompts.leakage import find_leaks
from stage_rl.prompts.sets import CATEGORIES
from stage_rl.rewards.t2i_r1 import SIDES

FOLDER = os.environ.get("STAGE_PROMPT_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="needs STAGE_PROMPT_DATA")
DATA = Path(FOLDER or ".")


def load(kind, path, **fields):
    return PromptsConfig.model_validate({"kind": kind, "path": str(DATA / path), **fields}).build()


def test_geneval_files_load_by_their_kind_and_as_files():
    assert len(load("geneval", "geneval/evaluation_metadata.jsonl")) == 553
    file = "geneval/flow_grpo_test_metadata.jsonl"
    prompts = load("geneval", file)
    assert set(Counter(prompt.text for prompt in prompts).values()) == {4}
    assert load("file", file) == prompts
    # The file holds nothing but evaluation prompts.
    assert len(find_leaks(prompts, as_prompts(geneval_prompts()))) == 553
    assert (DATA / "geneval" / "object_names.txt").read_text().split("\n")[:80] == list(CLASSES)


def test_the_t2i_r1_set_has_its_task_types():
    prompts = load("t2i_r1", "t2i_r1/train.jsonl")
    assert Counter(prompt.metadata["task_type"] for prompt in prompts) == {
        "spatial": 2195,
        "numeracy": 1172,
        "color": 879,
        "complex": 700,
        "non": 700,
        "texture": 695,
        "shape": 682,
        "object": 200,
    }
    assert sum("attr_nouns" in prompt.metadata for prompt in prompts) == 2256
    infos = [p.metadata["spatial_info"] for p in prompts if p.metadata["task_type"] == "spatial"]
    assert Counter(info["locality"] for info in infos) == {
        **{"left of": 392, "below": 375, "right of": 369, "above": 364, "on the bottom of": 134},
        **{"on the left of": 130, "on the right of": 128, "on the top of": 121},
        **{"next to": 61, "on side of": 61, "near": 60},
    }
    assert {info["locality"] for info in infos} <= SIDES.keys()
    some = load("t2i_r1", "t2i_r1/train.jsonl", task_types=["object"])
    assert [p for p in prompts if p.metadata["task_type"] == "object"] == list(some)


def test_six_training_prompts_of_t2i_r1_are_evaluation_prompts():
    training = load("t2i_r1", "t2i_r1/train.jsonl")
    evaluation = load("t2i_compbench", "t2i_compbench")
    leaks = find_leaks(training, evaluation)
    assert len(leaks) == 6
    assert all(leak.same_text for leak in leaks)
    assert find_leaks(training, as_prompts(geneval_prompts())) == []


def test_t2i_compbench_has_eight_annotated_categories_of_300():
    prompts = load("t2i_compbench", "t2i_compbench")
    assert [prompt.index for prompt in prompts] == list(range(2400))
    by_category = {c: [p for p in prompts if p.metadata["category"] == c] for c in CATEGORIES}
    assert {len(some) for some in by_category.values()} == {300}
    parts = Counter(prompt.metadata["complex_part"] for prompt in by_category["complex"])
    assert parts == {"action": 212, "spatial": 58, "all": 30}
    for category in ("color", "shape", "texture"):
        assert all(prompt.metadata["attr_nouns"] for prompt in by_category[category])
    # Of 300 + 58 + 30 prompts that are judged in the plane one names no relation ("sank below").
    placed = [*by_category["spatial"], *by_category["complex"]]
    placed = [prompt for prompt in placed if prompt.metadata.get("complex_part") != "action"]
    assert len([p for p in placed if "spatial_info" in p.metadata]) == 387


def test_the_ocr_levels_are_those_of_the_published_buckets():
    plain = load("ocr", "ocr/test.txt")
    buckets = load("ocr", "ocr/length_buckets.csv")
    assert plain == buckets
    with (DATA / "ocr" / "length_buckets.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [prompt.metadata["level"] for prompt in buckets] == [row["level"] for row in rows]
    targets = [prompt.metadata["target"] for prompt in buckets]
    assert [len(t.replace(" ", "")) for t in targets] == [int(row["length"]) for row in rows]


def test_drawbench_has_eleven_categories():
    prompts = load("drawbench", "drawbench/prompts.csv")
    counts = Counter(prompt.metadata["category"] for prompt in prompts)
    assert sum(counts.values()) == 200
    assert len(counts) == 11
    assert counts["Colors"] == 25
