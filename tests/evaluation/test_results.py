"""Estimates with their errors, results as text and JSON, two results side by side, diversity."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from stage_rl.errors import InputError
from stage_rl.evaluation.aggregation import ImageAnswers, PromptAnswers
from stage_rl.evaluation.figures import NUM_DRAWS, figure_draws
from stage_rl.evaluation.results import (
    Comparison,
    ImageScore,
    Results,
    Setup,
    bootstrap_intervals,
    group_diversity,
    object_cells,
    render_table,
    task_scores,
)


def images(task, values_by_prompt):
    return [
        ImageScore(task, prompt, image, value)
        for prompt, values in enumerate(values_by_prompt)
        for image, value in enumerate(values)
    ]


def estimate_of(values_by_prompt):
    return task_scores(images("colors", values_by_prompt))["colors"]


@pytest.mark.parametrize(
    ("values_by_prompt", "mean", "error"),
    [
        # Prompt means 1, 0, 1/2, 1/2: std sqrt(1/6), over sqrt(4) prompts.
        ([[1, 1], [0, 0], [1, 0], [0, 1]], 0.5, math.sqrt(1 / 6) / 2),
        # Sums of deviations from 3/4: 3 * 1/4 and -3/4: sqrt(2 / 1 * (9/16 + 9/16)) / 4 = 1.5 / 4.
        ([[1, 1, 1], [0]], 0.75, 0.375),
    ],
)
def test_the_standard_error_counts_prompts(values_by_prompt, mean, error):
    estimate = estimate_of(values_by_prompt)
    assert estimate.mean == mean
    assert estimate.standard_error == pytest.approx(error)
    assert estimate.num_images == sum(map(len, values_by_prompt))
    assert estimate.num_prompts == len(values_by_prompt)


def test_one_prompt_has_no_standard_error_nor_has_the_mean_of_its_task_and_others():
    scores = task_scores([*images("colors", [[1, 1]]), *images("position", [[1], [0]])])
    assert scores["colors"].standard_error is scores["colors"].interval is None
    assert scores["overall"].standard_error is None


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    # 400 sets of 60 prompts x 4 images with prompt effects; 95 % +- 3 x 1.1 %.
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        chance_P = rng.beta(2, 2, 60)
        low, high = estimate_of((rng.random((60, 4)) < chance_P[:, None]).astype(float)).interval
        hits += low <= 0.5 <= high
    assert 0.917 <= hits / 400 <= 0.983


def test_overall_is_the_unweighted_mean_over_tasks_or_over_all_images():
    # 1 and 1/4, however many images each has; errors 0 and std(1, 0, 0, 0) / 2 = 1/4.
    rows = [*images("colors", [[1, 1], [1, 1]]), *images("position", [[1], [0], [0], [0]])]
    scores = task_scores(rows)
    overall = scores["overall"]
    assert overall.mean == pytest.approx(0.625)
    assert overall.standard_error == pytest.approx(0.25 / 2)
    assert (overall.num_images, overall.num_prompts) == (8, 6)
    assert list(scores) == ["colors", "position", "overall"]
    assert task_scores(rows, pooled=True)["overall"].mean == 5 / 8


BASE = images("colors", [[0, 1], [0, 0], [1, 1], [0, 1]])
BETTER = images("colors", [[1, 1], [0, 1], [1, 1], [0, 1]])


def test_the_freedom_of_the_overall_mean_is_welchs():
    # Errors 1/2 (2 prompts: 1, 0) and 1/4 (4 prompts: 1, 0, 0, 0), freedoms 1 and 3:
    # (1/4 + 1/16)^2 / (1/16 / 1 + 1/256 / 3) = 0.097656 / 0.063802 = 1.5306.
    scores = task_scores([*images("colors", [[1], [0]]), *images("position", [[1], [0], [0], [0]])])
    assert scores["overall"].freedom == pytest.approx(1.5306, abs=1e-4)
    assert scores["colors"].freedom == 1
    # Tasks without any error: as many as the prompts of both have.
    equal = task_scores([*images("colors", [[1], [1]]), *images("position", [[0], [0], [0]])])
    assert equal["overall"].freedom == 3
    assert equal["overall"].interval == (0.5, 0.5)


def test_the_table_has_a_line_per_task_and_a_column_per_policy():
    text = render_table({"base": task_scores(BASE), "trained": task_scores(BETTER)})
    # base: prompt means 1/2, 0, 1, 1/2: std 0.408 / 2; trained: 1, 1/2, 1, 1/2: std 0.289 / 2.
    assert text.splitlines() == [
        "task               base         trained",
        "colors   0.500 +- 0.204  0.750 +- 0.144",
        "overall  0.500 +- 0.204  0.750 +- 0.144",
    ]


def test_bootstrap_intervals_draw_prompts_with_all_their_images():
    scores = images("colors", [[0.0, 0.0], [1.0, 1.0]])
    # Two prompts: the mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_intervals(scores) == {"colors": (0.0, 1.0), "overall": (0.0, 1.0)}
    assert bootstrap_intervals(images("colors", [[0.0, 1.0]])) == {"colors": None, "overall": None}
    assert bootstrap_intervals(images("colors", [[1.0], [1.0]]))["colors"] == (1.0, 1.0)


def test_bootstrap_intervals_agree_with_the_standard_error_of_many_prompts():
    scores = images("a", [[float(i % 2)] for i in range(400)])
    scores += images("b", [[float(i % 4 == 0)] for i in range(400)])
    low, high = bootstrap_intervals(scores)["overall"]
    mean = task_scores(scores)["overall"]
    # 1.96 standard errors: sqrt(1/4/400 + 3/16/400) / 2 = 0.0165.
    assert mean.standard_error == pytest.approx(0.0165, abs=1e-4)
    assert low == pytest.approx(0.375 - 1.96 * 0.0165, abs=0.004)
    assert high == pytest.approx(0.375 + 1.96 * 0.0165, abs=0.004)


def test_a_table_shows_bootstrap_intervals_where_it_has_them():
    columns = {"base": task_scores(BASE), "95 %": {"colors": (0.25, 0.75), "overall": None}}
    assert render_table(columns).splitlines()[1:] == [
        "colors   0.500 +- 0.204  [0.250, 0.750]",
        "overall  0.500 +- 0.204       not known",
    ]


SETUP = Setup("shapes-geneval", "2 images per task", 3.0, 0, "mixed")


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


def test_without_any_score_the_main_measure_is_one_line():
    with pytest.raises(InputError, match="shapes-geneval: no image has a score"):
        _ = results("mine", ()).main_measure


def test_json_keeps_every_image():
    figures = json.loads(json.dumps(results("mine", (1, 1, 0, 1)).to_json(), allow_nan=False))
    overall = figures["summary"]["gold"]["overall"]
    assert (overall["mean"], overall["num_prompts"]) == (0.75, 2)
    # Student's t for 2 - 1 prompts: 12.706 at 97.5 %; the standard error is 0.25: 0.75 -+ 3.18.
    # A share of right images ends at 0 and 1.
    assert overall["interval"] == [0, 1]
    assert figures["scores"]["gold"] == {"colors": [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]]}
    assert (figures["model"], figures["seed"], figures["guidance_scale"]) == ("mine", 0, 3.0)


def test_a_comparison_is_paired():
    comparison = Comparison(results("old", (0, 1, 0, 0)), results("new", (1, 1, 0, 1)))
    change = comparison.difference("gold")["overall"]
    # Differences by image 1, 0, 0, 1; by prompt 0.5 and 0.5: no error, though each has its own.
    assert change.mean == 0.5
    assert change.standard_error == pytest.approx(0)
    rows = [line.split() for line in comparison.table().splitlines()]
    assert ["colors", "0.250", "0.750", "+0.500", "[+0.500,", "+0.500]"] in rows


def test_what_one_model_has_no_measure_of_leaves_the_difference():
    trained = results("new", (1, 1, 1, 1), [(0, 0.75), (1, 0.1)])
    comparison = Comparison(results("old", (0, 0, 0, 0), [(0, 0.5)]), trained)
    change = comparison.difference("diversity")["overall"]
    assert (change.mean, change.num_prompts) == (0.25, 1)
    rows = [line.split() for line in comparison.table().splitlines()]
    # One prompt has no standard error; the trained model's second prompt counts nowhere.
    assert ["diversity", "0.500", "0.750", "+0.250", "not", "known"] in rows
    comparison = Comparison(results("old", (0, 0, 0, 0)), trained)
    assert "diversity" not in comparison.table()
    assert set(comparison.to_json()["difference"]) == {"gold"}


def test_an_interval_of_verdicts_ends_where_they_do_and_that_of_a_measure_does_not():
    # By prompt +1 and 0: mean 0.5, standard error 0.5, with t = 12.706 an interval of +- 6.353.
    halves = [(0, 0.5), (1, 0.5)], [(0, 1.5), (1, 0.5)]
    old, new = results("old", (0, 0, 0, 0), halves[0]), results("new", (1, 1, 0, 0), halves[1])
    comparison = Comparison(old, new)
    assert comparison.difference("gold")["overall"].interval == (-1, 1)
    low, high = 0.5 - 6.353, 0.5 + 6.353
    interval = comparison.difference("diversity")["overall"].interval
    assert interval == pytest.approx((low, high), abs=1e-3)
    assert comparison.to_json()["difference"]["gold"]["overall"]["interval"] == (-1, 1)


def test_a_table_names_the_models_only_where_the_columns_do_not():
    told = Comparison(results("base", (0, 0, 0, 0)), results("trained", (1, 0, 0, 0))).table()
    assert told.splitlines()[0] == str(SETUP)
    others = Comparison(results("shapes", (0, 0, 0, 0)), results("runs/a", (1, 0, 0, 0))).table()
    assert others.splitlines()[0] == f"{SETUP}: base shapes, trained runs/a"


def test_figures_of_two_models_are_paired_draw_by_draw():
    def of(model, figure, draws):
        one = results(model, (0, 1, 0, 1))
        return replace(one, figures={"GM": figure}, figure_draws={"GM": draws}, overall_row="mean")

    before, after = of("old", 10.0, (0.0, 20.0) * 200), of("new", 12.0, (2.0, 22.0) * 200)
    assert before.figure_interval("GM") == (0, 20)
    assert "GM  10.000 [0.000, 20.000]" in before.table()
    comparison = Comparison(before, after)
    # However far the draws spread, the difference is 2 in every one.
    assert comparison.differences == {"GM": (2, (2, 2))}
    rows = [line.split() for line in comparison.table().splitlines()]
    assert ["GM", "10.000", "12.000", "+2.000", "[+2.000,", "+2.000]"] in rows
    assert comparison.to_json()["figures"]["GM"] == {"mean": 2, "interval": (2, 2)}
    assert of("x", 1.0, (1.0, None)).figure_interval("GM") is None


def test_draws_take_as_many_prompts_of_each_task_again():
    def share(rows):
        return {"share": sum(row.images[0].values[0] for row in rows) / len(rows)}

    rows = [PromptAnswers((ImageAnswers((value,)),)) for value in (0.0, 1.0, 1.0, 1.0)]
    draws = figure_draws(rows, ["a", "a", "b", "b"], share)["share"]
    # Of a: 0, 1/2 or 1 with chances 1/4, 1/2, 1/4; b is always 1.
    assert set(draws) == {0.5, 0.75, 1.0}
    assert draws.count(0.75) / NUM_DRAWS == pytest.approx(0.5, abs=0.1)
    assert draws == figure_draws(rows, ["a", "a", "b", "b"], share)["share"]
    assert figure_draws(rows, ["a", "b", "b", "b"], share) == {}


def test_results_of_different_streams_are_not_paired():
    other = results("new", (1, 1, 1, 1), setup=replace(SETUP, seed=1))
    with pytest.raises(AssertionError, match="cannot be paired"):
        Comparison(results("old", (0, 0, 0, 0)), other)


def test_a_cell_is_an_objects_where_most_of_it_is_foreground():
    foreground_NHW = np.zeros((1, 4, 8), bool)
    foreground_NHW[0, :, :2] = True  # 4 x 2 of 4 x 4 pixels: half is not most
    foreground_NHW[0, :3, 4:7] = True  # 3 x 3 of 16
    assert object_cells(foreground_NHW, (1, 2)).tolist() == [[False, True]]


def test_diversity_is_one_minus_the_mean_cosine_over_pairs():
    # Three images, two tokens. Token 0 shows codes e1, e1, e2: cosines 1, 0, 0, and is background
    # in all. Token 1 shows e1, -e1, 2 e1: cosines -1, 1, -1; image 0 has an object there, so the
    # pairs (0, 1) and (0, 2) are an object's and (1, 2) is background.
    codes_GTC = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [-1, 0]], [[0, 1], [2, 0]]])
    object_GT = torch.tensor([[False, True], [False, False], [False, False]])
    assert group_diversity(codes_GTC, object_GT) == {
        "objects": pytest.approx(1 - (-1 + 1) / 2),
        "background": pytest.approx(1 - (1 + 0 + 0 - 1) / 4),
    }


@pytest.mark.parametrize(("num_images", "expected"), [(4, {"background": 0.0}), (1, {})])
def test_equal_images_have_no_diversity_and_a_single_one_none_to_tell(num_images, expected):
    codes_GTC = torch.randn(1, 5, 3).expand(num_images, -1, -1)
    seen = group_diversity(codes_GTC, torch.zeros(num_images, 5, dtype=torch.bool))
    assert seen == pytest.approx(expected, abs=1e-6)
