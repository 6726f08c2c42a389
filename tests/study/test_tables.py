"""The tables of a study, from results written by hand."""

import pytest

from stage_rl.errors import InputError
from stage_rl.study.statistics import End
from stage_rl.study.tables import RunResult, merge_results, study_tables

STEPS = [25, 50, 75, 100, 125]


def a_run(arm, seed, golds, divergences, failed=""):
    return {
        "cell": "hot",
        "arm": arm,
        "seed": seed,
        "recipe": "r",
        "overrides": [],
        "steps": STEPS[-1],
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
    (row, _) = [row for row in text.splitlines() if row.startswith("stage - grpo")]
    assert row.split()[3:5] == ["2", "+0.090"]
    assert "never" not in text
    assert "cell empty" not in text


def test_arms_are_compared_at_equal_divergence():
    weak = [a_run("weak", seed, [0.3] * 5, [0.01] * 5) for seed in (1, 2)]
    arms = RESULTS["study"]["arms"] | {"weak": {}}
    study = RESULTS["study"] | {"arms": arms, "lines": [["weak", "grpo"], ["never", "grpo"]]}
    runs = [*RESULTS["runs"][:3], *weak]
    runs.append(a_run("stage", 2, [0.38] * 5, [0.01, 0.04, 0.09, 0.16, 0.25]))
    # At K = 0.25 the line ends where grpo does, with 0.1 and 0.4.
    text = study_tables(RESULTS | {"study": study, "runs": runs})
    above = text[text.index("above the line weak - grpo") :]
    assert line_of(above, "stage ", "not known")[:5] == ["stage", "2", "2", "+0.090", "+-"]
    # At K = 0.09 it is half of the way from 0.3 to them.
    near = [a_run("stage", seed, [0.3] * 5, [0.09] * 5) for seed in (1, 2)]
    text = study_tables(RESULTS | {"study": study, "runs": [*RESULTS["runs"][:2], *weak, *near]})
    above = text[text.index("above the line weak - grpo") :]
    # 0.3 - 0.2 and 0.3 - 0.35
    assert line_of(above, "stage ", "not known")[1:6] == ["2", "2", "+0.025", "+-", "0.075"]


def test_a_run_ends_with_a_score_and_the_divergence_of_the_same_evaluations():
    series = {
        "validation/gold": ([40, 80], [0.3, 0.4]),
        # After step 71, which no evaluation is of, it was elsewhere.
        "probe/kl": ([40, 71, 80], [0.01, 9.0, 0.04]),
    }
    assert RunResult(1, "", series).end("validation/gold") == End(0.04, 0.4)
    assert RunResult(1, "", {}).end("validation/gold") is None


def test_how_many_end_between_the_two_is_shown():
    arms = RESULTS["study"]["arms"] | {"weak": {}}
    study = RESULTS["study"] | {"arms": arms, "lines": [["weak", "grpo"]]}
    runs = [
        *(a_run("weak", seed, [0.3] * 5, [0.01] * 5) for seed in (1, 2)),
        *(a_run("grpo", seed, [0.4] * 5, [0.04] * 5) for seed in (1, 2)),
        a_run("stage", 1, [0.3] * 5, [0.02] * 5),
        a_run("stage", 2, [0.3] * 5, [0.05] * 5),
    ]
    text = study_tables(RESULTS | {"study": study, "runs": runs})
    above = text[text.index("above the line weak - grpo") :]
    assert line_of(above, "stage ", "not known")[:3] == ["stage", "2", "1"]


def test_what_a_run_ends_with_is_compared_without_a_test():
    text = study_tables(RESULTS)
    header = next(row for row in text.splitlines() if "|drift|" in row)
    assert "gold" in header
    rows = [row for row in text.splitlines() if row.startswith("stage - grpo")]
    # Two seeds have no interval; K and drift are the same in both arms.
    assert rows[1].split() == ["stage", "-", "grpo", "+0.090", "+0.000", "+0.000", "+0.000"]


def test_the_endpoint_is_shown_by_task():
    runs = [a_run("grpo", seed, [0.3] * 5, [0.01] * 5) for seed in (1, 2)]
    for run, value in zip(runs, (0.6, 0.8), strict=True):
        run["series"]["validation/gold/counting"] = [STEPS, [0.0] * 4 + [value]]
    base = {"hot": {"validation/gold": 0.3, "validation/gold/counting": 0.25}}
    text = study_tables(RESULTS | {"runs": runs, "base": base})
    assert line_of(text, "by task", "counting") == ["by", "task", "counting", "overall"]
    assert line_of(text, "base", "0.250") == ["base", "0.250", "0.300"]
    assert line_of(text, "grpo", "0.700")[:4] == ["grpo", "0.700", "+-", "0.100"]


def test_what_the_entropy_reward_does_is_shown_of_arms_that_have_one():
    runs = [a_run(arm, seed, [0.3] * 5, [0.01] * 5) for arm in ("grpo", "stage") for seed in (1, 2)]
    for run, share in zip(runs[2:], (0.2, 0.4), strict=True):
        run["series"]["entropy/advantage_share"] = [STEPS, [share] * 5]
        run["series"]["reward/equal_groups"] = [STEPS, [0.25] * 5]
    # One run only says it of the groups of equal rewards, at two of its steps.
    runs[3]["series"]["entropy/equal_groups_share"] = [STEPS[:2], [0.9, 1.0]]
    text = study_tables(RESULTS | {"runs": runs})
    _, below = text.split("entropy reward", 1)
    row = " ".join(below.splitlines()[1].split())
    assert row == "stage 0.300 +- 0.100 (2) 0.250 +- 0.000 (2) 0.950 (1)"


def test_studies_of_one_cell_are_shown_together():
    more = {
        "study": RESULTS["study"]
        | {"name": "more", "arms": {"grpo": {}, "mask": {}}, "contrasts": [["mask", "grpo"]]},
        "base": {},
        "runs": [a_run("mask", seed, [0.5] * 5, [0.01] * 5) for seed in (1, 2)],
    }
    text = study_tables(merge_results([RESULTS, more]))
    rows = [row for row in text.splitlines() if row.startswith("mask - grpo")]
    # 0.5 - 0.1 and 0.5 - 0.4
    assert "+0.250" in rows[0].split()
    other = more | {"study": more["study"] | {"cells": {"hot": ["optimizer.lr=2"]}}}
    with pytest.raises(InputError, match="more: cell hot is another than in tiny"):
        merge_results([RESULTS, other])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"arms": {"grpo": {"overrides": ["algorithm.beta=1"]}}}, "arm grpo"),
        ({"arms": {"grpo": {"recipe": "other"}}}, "arm grpo"),
        ({"recipe": "other"}, "arm grpo"),
        ({"overrides": ["steps=9"]}, "arm grpo"),
        ({"endpoint": "validation/structure"}, "the endpoint"),
    ],
)
def test_different_arms_of_one_name_are_not_shown_together(change, what):
    other = RESULTS | {"study": RESULTS["study"] | {"name": "more"} | change}
    with pytest.raises(InputError, match=f"more: {what} is another than in tiny"):
        merge_results([RESULTS, other])


def test_what_makes_no_run_another_may_differ_between_studies():
    arms = {"grpo": {"note": "C0", "seeds": [1], "cells": ["hot"]}, "mask": {}}
    other = RESULTS | {"study": RESULTS["study"] | {"name": "more", "arms": arms}}
    assert list(merge_results([RESULTS, other])["study"]["arms"]) == [
        *("grpo", "stage", "never"),
        "mask",
    ]


def test_a_run_that_was_stopped_is_named_and_counts_only_where_no_other_finished():
    stopped = [
        a_run("grpo", 3, [0.9] * 5, [0.01] * 5) | {"steps": 200},
        a_run("mask", 1, [0.7] * 5, [0.01] * 5) | {"steps": 200},
    ]
    study = RESULTS["study"] | {"arms": {"grpo": {}, "mask": {}}}
    text = study_tables(RESULTS | {"study": study, "runs": [*RESULTS["runs"][:2], *stopped]})
    assert line_of(text, "grpo", "0.250")[1] == "2"
    assert line_of(text, "mask", "not known")[1:3] == ["1", "0.700"]
    assert text.endswith("unfinished: grpo/3 after 125 of 200 steps, mask/1 after 125 of 200 steps")


def cut_short(arm, seed, failed, **more):
    """A run that ended after its second evaluation, at its best."""
    run = a_run(arm, seed, [0.8] * 5, [0.01] * 5, failed)
    cut = {name: [steps[:2], values[:2]] for name, (steps, values) in run["series"].items()}
    return run | {"series": cut} | more


@pytest.mark.parametrize(
    ("failed", "more"),
    [
        ("error: step 51: anything", {"diverged": True}),
        ("error: step 51: the kl loss is nan (prompts 'a'); lower", {}),
        ("error: step 51: the gradient norm is inf; lower", {}),
        ("error: the update at learning rate 1 made parameters that are not finite; lower", {}),
        ("error: the logits of the policy are not finite: its", {}),
        ("error: guidance_scale 3 at temperature 1 makes logits that are not finite; lower", {}),
    ],
)
def test_a_run_that_diverged_has_no_end_and_broke(failed, more):
    text = study_tables(
        RESULTS | {"runs": [*RESULTS["runs"], cut_short("grpo", 3, failed, **more)]}
    )
    line = line_of(text, "grpo", "diverged")
    assert line[1:7] == ["2", "(1", "diverged)", "0.250", "+-", "0.150"]
    assert line[-1] == "2/3"
    assert "diverged: grpo/3 after 50 of 125 steps (error: " in text


def test_a_run_that_diverged_is_in_no_pair():
    runs = [*RESULTS["runs"], cut_short("grpo", 3, "x", diverged=True)]
    runs.append(a_run("stage", 3, [0.9] * 5, [0.01] * 5))
    rows = [row for row in study_tables(RESULTS | {"runs": runs}).splitlines() if "stage -" in row]
    assert rows[0].split()[3:5] == ["2", "+0.090"]


def test_a_run_that_diverged_before_its_first_step_broke():
    run = cut_short("grpo", 3, "x", diverged=True) | {"series": {}}
    text = study_tables(RESULTS | {"runs": [*RESULTS["runs"], run]})
    assert line_of(text, "grpo", "diverged")[-1] == "2/3"


@pytest.mark.parametrize("more", [{}, {"diverged": False}])
def test_a_run_that_failed_otherwise_is_named_and_counts_nowhere(more):
    killed = cut_short("grpo", 3, "killed by signal 9", **more)
    text = study_tables(RESULTS | {"runs": [*RESULTS["runs"], killed]})
    assert line_of(text, "grpo", "0.250")[1:5] == ["2", "0.250", "+-", "0.150"]
    assert line_of(text, "grpo", "0.250")[-1] == "1/2"
    assert text.endswith("failed: grpo/3 after 50 of 125 steps (killed by signal 9)")
