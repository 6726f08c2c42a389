"""The tables of a study, from results written by hand."""

from stage_rl.study.tables import study_tables

STEPS = [25, 50, 75, 100, 125]


def a_run(arm, seed, golds, divergences, failed=""):
    return {
        "cell": "hot",
        "arm": arm,
        "seed": seed,
        "recipe": "r",
        "overrides": [],
        "failed": failed,
        "series": {
            "validation/gold": [STEPS, golds],
            "probe/kl": [STEPS, divergences],
            "probe/entropy_drift": [STEPS, [0.0, 0.2, 0.0, 0.2, 0.0]],
            "reward/mean": [STEPS, [0.5] * 5],
        },
    }


RESULTS = {
    "study": {
        "name": "tiny",
        "cells": {"hot": ["optimizer.lr=1e-4"], "empty": []},
        "arms": {"grpo": {}, "stage": {}, "never": {}},
        "endpoint": "validation/gold",
        "contrasts": [["stage", "grpo"], ["never", "grpo"]],
    },
    "base": {"hot": {"validation/gold": 0.3}},
    "runs": [
        a_run("grpo", 1, [0.32, 0.34, 0.3, 0.1, 0.1], [0.01, 0.04, 0.09, 0.16, 0.25]),
        a_run("grpo", 2, [0.32, 0.34, 0.36, 0.38, 0.4], [0.01, 0.04, 0.09, 0.16, 0.25]),
        a_run("stage", 1, [0.32, 0.34, 0.36, 0.38, 0.3], [0.01, 0.04, 0.09, 0.16, 0.25]),
        a_run("stage", 2, [0.32, 0.34, 0.36, 0.38, None], [0.01, 0.04, 0.09, 0.16, 0.25]),
    ],
}


def line_of(text, *starts):
    (line,) = [row for row in text.splitlines() if row.startswith(starts[0]) and starts[1] in row]
    return line.split()


def test_each_arm_ends_where_its_last_evaluations_are():
    text = study_tables(RESULTS)
    # The last of five evaluations: 0.1 and 0.4; (0.3) and the last finite one, 0.38.
    assert line_of(text, "grpo", "0.250")[1:5] == ["2", "0.250", "+-", "0.150"]
    assert line_of(text, "stage", "0.340")[1:3] == ["2", "0.340"]


def test_a_breakdown_is_counted_per_arm():
    text = study_tables(RESULTS)
    # Seed 1 of grpo: the mean of 0.3, 0.1, 0.1 is below 0.3 - 0.05.
    assert line_of(text, "grpo", "0.250")[-1] == "1/2"
    assert line_of(text, "stage", "0.340")[-1] == "0/2"


def test_contrasts_are_paired_by_seed_and_arms_without_runs_are_left_out():
    text = study_tables(RESULTS)
    # 0.3 - 0.1 and 0.38 - 0.4: mean 0.09
    assert "+0.090" in line_of(text, "stage - grpo", "+0.090")
    assert "never" not in text
    assert "cell empty" not in text


def test_arms_are_compared_at_equal_divergence():
    text = study_tables(RESULTS)
    assert "K = 0.1" in text
    # sqrt(0.01) = 0.1 is the first evaluation: 0.32 for both seeds.
    assert line_of(text, "grpo", "0.320")[1:5] == ["0.320", "+-", "0.000", "(2)"]
