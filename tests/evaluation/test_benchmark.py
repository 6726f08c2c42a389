"""Results as text and JSON, and two results side by side."""

import json

import pytest

from stage_rl.evaluation.results import ImageScore, Results, Setup, compare

SETUP = Setup("shapes-geneval", 2, 3.0, 0, "mixed")


def results(model, gold, diversity=(), setup=SETUP):
    """Two prompts of two images each, by the gold judge; diversity by prompt."""
    scores = {
        "gold": tuple(ImageScore("colors", n // 2, n % 2, v) for n, v in enumerate(gold)),
        "diversity": tuple(ImageScore("colors", p, 0, v) for p, v in diversity),
    }
    return Results(model, setup, {name: rows for name, rows in scores.items() if rows}, ("gold",))


def test_a_table_has_every_measure():
    lines = results("mine", (1, 1, 0, 1), [(0, 0.25), (1, 0.75)]).table().splitlines()
    assert lines[0] == ("mine: shapes-geneval, 2 images per task, guidance 3, seed 0, mixed")
    # Prompt means 1 and 0.5: mean 0.75, standard error 0.3536 / sqrt 2 = 0.25.
    # The bootstrap draws both prompts twice, or each once: 0.5, 0.75 or 1.
    assert lines[3].split() == ["colors", "0.750", "+-", "0.250", "[0.500,", "1.000]"]
    assert lines[4].split() == ["overall", "0.750", "+-", "0.250", "[0.500,", "1.000]"]
    assert lines[-1].split() == ["diversity", "0.500", "+-", "0.250"]


def test_json_keeps_every_image():
    figures = json.loads(json.dumps(results("mine", (1, 1, 0, 1)).to_json(), allow_nan=False))
    assert figures["scores"]["gold"] == {"colors": [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]]}
    assert figures["summary"]["gold"]["overall"]["mean"] == 0.75
    assert (figures["model"], figures["seed"], figures["guidance_scale"]) == ("mine", 0, 3.0)


def test_a_comparison_is_paired():
    base, trained = results("old", (0, 1, 0, 0)), results("new", (1, 1, 0, 1))
    change = compare(base, trained).difference("gold")
    assert change is not None
    # Differences by image 1, 0, 0, 1; by prompt 0.5 and 0.5: no error, though each has its own.
    assert change.overall.mean == 0.5
    assert change.overall.standard_error == pytest.approx(0)
    rows = [line.split() for line in compare(base, trained).table().splitlines()]
    assert ["colors", "0.250", "0.750", "+0.500", "[+0.500,", "+0.500]"] in rows


def test_a_prompt_that_one_model_has_no_diversity_for_leaves_the_difference():
    base = results("old", (0, 0, 0, 0), [(0, 0.5)])
    trained = results("new", (1, 1, 1, 1), [(0, 0.75), (1, 0.1)])
    change = compare(base, trained).difference("diversity")
    assert change is not None
    assert (change.overall.mean, change.overall.num_prompts) == (0.25, 1)
    rows = [line.split() for line in compare(base, trained).table().splitlines()]
    # One prompt has no standard error; the trained model's second prompt counts nowhere.
    assert ["diversity", "0.500", "0.750", "+0.250", "not", "known"] in rows


def test_a_measure_that_one_model_lacks_is_left_out():
    comparison = compare(results("old", (0, 0, 0, 0)), results("new", (1, 1, 1, 1), [(0, 0.5)]))
    assert "diversity" not in comparison.table()
    assert set(comparison.to_json()["difference"]) == {"gold"}


def test_results_of_different_streams_are_not_paired():
    other = results("new", (1, 1, 1, 1), setup=Setup("shapes-geneval", 2, 3.0, 1, "mixed"))
    with pytest.raises(AssertionError, match="cannot be paired"):
        compare(results("old", (0, 0, 0, 0)), other)
