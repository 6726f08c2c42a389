import json
import math

import numpy as np
import pytest

from stage_rl.evaluation.results import (
    ImageScore,
    bootstrap_intervals,
    clustered_mean,
    paired_difference,
    render_table,
    task_scores,
)


def images(task, values_by_prompt):
    return [
        ImageScore(task, prompt, image, value)
        for prompt, values in enumerate(values_by_prompt)
        for image, value in enumerate(values)
    ]


def test_the_standard_error_counts_prompts():
    # Prompt means 1, 0, 1/2, 1/2: std sqrt(1/6), over sqrt(4) prompts.
    estimate = clustered_mean([1, 1, 0, 0, 1, 0, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3])
    assert estimate.mean == 0.5
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 6) / 2)
    assert (estimate.num_images, estimate.num_prompts) == (8, 4)


def test_prompts_may_have_different_numbers_of_images():
    # Mean 3/4; sums of deviations: 3 * 1/4 and -3/4: sqrt(2 / 1 * (9/16 + 9/16)) / 4 = 1.5 / 4.
    estimate = clustered_mean([1, 1, 1, 0], [0, 0, 0, 1])
    assert estimate.standard_error == pytest.approx(0.375)


def test_one_prompt_has_no_standard_error():
    estimate = clustered_mean([1, 0], [5, 5])
    assert estimate.standard_error is None
    assert estimate.interval is None


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    # 400 sets of 60 prompts x 4 images with prompt effects; 95 % +- 3 x 1.1 %.
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        chance_P = rng.beta(2, 2, 60)
        values = rng.random((60, 4)) < chance_P[:, None]
        estimate = clustered_mean(values.ravel().astype(float), np.repeat(np.arange(60), 4))
        low, high = estimate.interval
        hits += low <= 0.5 <= high
    assert 0.917 <= hits / 400 <= 0.983


def test_overall_is_the_unweighted_mean_over_tasks():
    # 1 and 1/4, however many images each has; errors 0 and std(1, 0, 0, 0) / 2 = 1/4.
    scores = task_scores(
        [*images("colors", [[1, 1], [1, 1]]), *images("position", [[1], [0], [0], [0]])]
    )
    assert scores.overall.mean == pytest.approx(0.625)
    assert scores.overall.standard_error == pytest.approx(0.25 / 2)
    assert (scores.overall.num_images, scores.overall.num_prompts) == (8, 6)
    assert list(scores.tasks) == ["colors", "position"]


def test_all_correct_in_one_of_six_tasks_is_a_sixth():
    scores = [score for task in "abcdef" for score in images(task, [[float(task == "a")] * 4] * 3)]
    assert task_scores(scores).overall.mean == pytest.approx(1 / 6)


def test_overall_without_an_error_of_each_task_has_none():
    scores = task_scores([*images("colors", [[1, 1]]), *images("position", [[1], [0]])])
    assert scores.overall.standard_error is None


BASE = images("colors", [[0, 1], [0, 0], [1, 1], [0, 1]])
BETTER = images("colors", [[1, 1], [0, 1], [1, 1], [0, 1]])


def test_the_paired_difference_is_taken_image_by_image():
    # Differences 1 0 | 0 1 | 0 0 | 0 0: prompt means 1/2, 1/2, 0, 0: std sqrt(1/12), over sqrt(4).
    difference = task_scores(paired_difference(BETTER, BASE[::-1]))
    estimate = difference.tasks["colors"]
    assert estimate.mean == 0.25
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 12) / 2)
    # Student's t for 4 - 1 prompts: 3.1824 at 97.5 %.
    half = 3.1824 * 0.144338
    assert estimate.interval == pytest.approx((0.25 - half, 0.25 + half), abs=1e-4)


def test_the_freedom_of_the_overall_mean_is_welchs():
    # Errors 1/2 (2 prompts: 1, 0) and 1/4 (4 prompts: 1, 0, 0, 0), freedoms 1 and 3:
    # (1/4 + 1/16)^2 / (1/16 / 1 + 1/256 / 3) = 0.097656 / 0.063802 = 1.5306.
    scores = task_scores([*images("colors", [[1], [0]]), *images("position", [[1], [0], [0], [0]])])
    assert scores.overall.freedom == pytest.approx(1.5306, abs=1e-4)
    assert scores.tasks["colors"].freedom == 1
    # Tasks without any error: as many as the prompts of both have.
    equal = task_scores([*images("colors", [[1], [1]]), *images("position", [[0], [0], [0]])])
    assert equal.overall.freedom == 3
    assert equal.overall.interval == (0.5, 0.5)


def test_pairing_refuses_other_images():
    with pytest.raises(AssertionError, match="not judged on the same images"):
        paired_difference(BETTER, BASE[1:])


def test_the_table_has_a_line_per_task_and_a_column_per_policy():
    text = render_table({"base": task_scores(BASE), "trained": task_scores(BETTER)})
    # base: prompt means 1/2, 0, 1, 1/2: std 0.408 / 2; trained: 1, 1/2, 1, 1/2: std 0.289 / 2.
    assert text.splitlines() == [
        "task               base         trained",
        "colors   0.500 +- 0.204  0.750 +- 0.144",
        "overall  0.500 +- 0.204  0.750 +- 0.144",
    ]


def test_json_holds_every_figure():
    saved = json.loads(json.dumps(task_scores(BASE).to_json()))
    assert saved.keys() == {"colors", "overall"}
    assert saved["colors"]["mean"] == 0.5
    assert saved["colors"]["num_prompts"] == 4
    low, high = saved["colors"]["interval"]
    assert low < 0.5 < high


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
    mean = task_scores(scores).overall
    # 1.96 standard errors: sqrt(1/4/400 + 3/16/400) / 2 = 0.0165.
    assert mean.standard_error == pytest.approx(0.0165, abs=1e-4)
    assert low == pytest.approx(0.375 - 1.96 * 0.0165, abs=0.004)
    assert high == pytest.approx(0.375 + 1.96 * 0.0165, abs=0.004)


def test_a_pooled_mean_is_that_of_all_images():
    scores = images("a", [[1.0]] * 3) + images("b", [[0.0]])
    # Tasks: (1 + 0) / 2; images: 3 of 4.
    assert task_scores(scores).overall.mean == 0.5
    assert task_scores(scores, pooled=True).overall.mean == 0.75


def test_a_table_shows_bootstrap_intervals_where_it_has_them():
    text = render_table(
        {"base": task_scores(BASE)}, intervals={"base": {"colors": (0.25, 0.75), "overall": None}}
    )
    assert text.splitlines()[1:] == [
        "colors   0.500 +- 0.204  [0.250, 0.750]",
        "overall  0.500 +- 0.204       not known",
    ]
