"""From answers to published figures, against numbers worked out by hand and published ones."""

import json
import os
from pathlib import Path

import pytest

from stage_rl.evaluation.aggregation import (
    WISE_WEIGHTS,
    ImageAnswers,
    PromptAnswers,
    alignment,
    dependency_graph,
    nine_groups,
    region_words,
    share_missing,
    soft_tifa,
    ten_dimensions,
    text_rendering,
    wise_weights,
    word_overlap,
)
from stage_rl.prompts.questions import Question
from stage_rl.rewards.vlm.judge import read_lines

DATA = Path(__file__).parents[1] / "data" / "benchmarks"


def row(values, *, groups=None, names=None, parents=None, replies=(), text=""):
    """A prompt with one image, or one image for each list of values."""
    images = values if values and isinstance(values[0], list) else [values]
    number = len(images[0])
    questions = tuple(
        Question(
            id=i + 1,
            text="?",
            group=names[i] if names else "",
            parents=tuple((parents or {}).get(i + 1, ())),
        )
        for i in range(number)
    )
    shown = tuple(ImageAnswers(tuple(one), tuple(replies)) for one in images)
    return PromptAnswers(shown, questions, groups or {}, {"text": text})


def test_soft_tifa_is_the_geometric_mean_of_the_atoms_of_an_image():
    rows = [
        row([0.25, 1.0], groups={"atoms": "3"}, names=["count", "object"]),  # GM .5, AM .625
        row([0.0, 1.0], groups={"atoms": "10"}, names=["count", "object"]),  # GM 0, AM .5
    ]
    assert soft_tifa(rows) == pytest.approx(
        {
            "GM": 25,
            "AM": 56.25,
            "count": 12.5,
            "object": 100,
            "GM, 3 atoms": 50,
            "GM, 10 atoms": 0,
        }
    )


def test_a_chain_falls_with_its_root_as_a_whole_or_link_by_link():
    named = {"groups": {"category": "anime"}, "names": ["entity - whole", "a", "a"]}
    chain = row([0.0, 1.0, 1.0], parents={2: [1], 3: [2]}, **named)
    # DPG-Bench: 2 is wrong with 1, 3 with 2. OneIG-Bench: 2 was answered right, so 3 stands.
    assert dependency_graph([chain], scale=100)["overall"] == 0
    assert alignment([chain])["overall"] == pytest.approx(1 / 3)
    # Categories of DPG-Bench pool what was answered, and two images count once each.
    both = dependency_graph([chain, row([[1.0], [0.0]], names=["entity"])])
    assert both == pytest.approx({"overall": 0.25, "entity": 1 / 3, "a": 1.0})


def test_the_categories_of_oneig_are_means_of_prompts_as_overall_is():
    rows = [
        row([0.0, 1.0], parents={2: [1]}, groups={"category": "anime"}),  # the child is 0: 0
        row([[1.0, 1.0], [1.0, 0.0]], groups={"category": "object"}),  # 1 and 1/2
        row([None, 1.0], groups={"category": "human"}),  # not answered
    ]
    assert alignment(rows) == {"overall": 0.375, "anime": 0, "object": 0.75}


def test_a_question_that_depends_on_itself_keeps_its_answer():
    assert alignment([row([1.0], parents={1: [1]}, groups={"category": "x"})])["overall"] == 1


def test_an_answer_that_is_missing_is_left_out_and_not_wrong():
    rows = [row([1.0, None]), row([1.0, 1.0])]
    assert share_missing(rows) == 0.25
    assert dependency_graph(rows)["overall"] == 1
    assert soft_tifa(rows)["GM"] == 100


def test_wise_weights_make_the_published_overall_of_its_categories():
    assert sum(WISE_WEIGHTS.values()) == pytest.approx(1)
    # Janus-Pro-1B and 7B in the leaderboard of the verified release.
    for shares, overall in (
        ((0.3050, 0.2333, 0.2333, 0.2167, 0.3083, 0.2000), 0.2650),
        ((0.3700, 0.3500, 0.2833, 0.2833, 0.4000, 0.2333), 0.3340),
    ):
        rows = [
            row([share], groups={"category": name})
            for name, share in zip(WISE_WEIGHTS, shares, strict=True)
        ]
        assert wise_weights(rows)["overall"] == pytest.approx(overall, abs=5e-5)
    assert "overall" not in wise_weights(rows[:5])


def test_nine_groups_of_the_raw_answers_of_janus_pro():
    counts = json.loads((DATA / "tiif_janus_pro_counts.json").read_text())
    rows = [
        row([1.0] * right + [0.0] * (all_ - right), groups={"length": length, "attribute": name})
        for length, attributes in counts.items()
        for name, (right, all_) in attributes.items()
    ]
    figures = nine_groups(rows)
    assert figures["short"] == pytest.approx(65.38, abs=0.005)
    assert figures["long"] == pytest.approx(61.10, abs=0.005)
    # Of texture+color 20/25, color+texture 20/25, shape+color 38/50, shape+texture 31/50.
    assert figures["short: Attribute"] == pytest.approx(25 * (0.8 + 0.8 + 0.76 + 0.62))
    without = [one for one in rows if one.groups["attribute"] != "real_world"]
    assert "short" not in nine_groups(without)


@pytest.mark.skipif("STAGE_BENCHMARK_CLONES" not in os.environ, reason="names no folder of clones")
@pytest.mark.parametrize(
    ("judge", "short", "long"), [("QwenVL", 65.38, 61.10), ("GPT-4o", 66.67, 65.19)]
)
def test_what_the_judges_of_janus_pro_wrote_makes_the_published_figures(judge, short, long):
    subset = "testmini_subset_eval_results"
    folder = Path(os.environ["STAGE_BENCHMARK_CLONES"]) / "TIIF-Bench/eval-results" / subset
    files = sorted((folder / f"{subset}_{judge}/Janus-Pro").glob("*/*/*.json"))
    if not files:
        pytest.skip(f"{folder} has no answers")
    rows = []
    for file in files:
        record = json.loads(file.read_text())
        expected = record["gt_answers"]
        asked = [Question(id=n, text="?", expected=word) for n, word in enumerate(expected, 1)]
        values = read_lines(record["model_output"], asked)
        assert values is not None, file
        groups = {"length": file.parent.name, "attribute": record["attribute"]}
        rows.append(row(values, groups=groups))
    assert len(rows) == 554
    figures = nine_groups(rows)
    assert (figures["short"], figures["long"]) == pytest.approx((short, long), abs=0.005)


def test_ten_dimensions_of_janus_pro_have_the_published_mean():
    published = {
        "Style": 90.40,
        "World Knowledge": 86.55,
        "Attribute - Color": 68.59,
        "Action - Hand (Character/Anthropomorphic)": 63.88,
        "Relationship - Comparison": 69.54,
        "Logical Reasoning": 35.68,
        "Grammar - Negation": 64.04,
        "Compound - Imagination": 60.18,
        "Entity Layout - Two-Dimensional Space": 72.76,
        "Text Generation": 2.01,
    }
    figures = ten_dimensions([row([v / 100 for v in published.values()], names=[*published])])
    assert figures["overall"] == pytest.approx(61.36, abs=0.005)
    assert figures["Attribute"] == pytest.approx(68.59)
    assert "overall" not in ten_dimensions([row([1.0], names=["Style"])])  # nine are missing
    # Test points are pooled, not sub-dimensions: (1 + 0 + 0) / 3.
    names = ["Action - State", "Action - Hand", "Action - Hand"]
    assert ten_dimensions([row([1.0, 0.0, 0.0], names=names)])["Action"] == pytest.approx(100 / 3)


def test_words_are_counted_as_often_as_they_are_read():
    rows = [
        row([], text="Fresh, fresh brews!", replies=["FRESH brews tea"]),  # 2 of 3
        row([], text="Open", replies=["No text recognized."]),  # 0 of 1
    ]
    assert word_overlap(rows) == {"words read": 0.5}


def test_the_text_score_joins_edits_exact_texts_and_words():
    rows = [row([], text="Open now", replies=["Open now."]), row([], text="Exit", replies=["Exi"])]
    # ED (0 + 1) / 2, CR 1/2, WAC 2/3: 1 - .5 * .5 * (1/3) / 100.
    assert text_rendering(rows) == pytest.approx(
        {"text": 1 - 0.5 * 0.5 / 3 / 100, "ED": 0.5, "CR": 0.5, "WAC": 2 / 3}
    )


def test_a_text_with_a_chinese_character_is_one_word_to_oneig_alone():
    # "Open\u5e97now" against "Open now": one edit, none of the two words.
    rows = [row([], text="Open now", replies=["Open \u5e97 now"])]
    assert text_rendering(rows) == pytest.approx({"text": 0.99, "ED": 1, "CR": 0, "WAC": 0})
    assert word_overlap(rows) == {"words read": 1}


def test_each_word_is_held_against_the_closest_one_that_was_read():
    rows = [row([], text="sale today", replies=["SALE\ntodey x"])]
    expected = {"word accuracy": 0.5, "NED": (1 + 1 - 1 / (5 + 1e-5)) / 2}
    assert region_words(rows) == pytest.approx(expected)
    assert region_words([row([], text="sale")])["word accuracy"] == 0
